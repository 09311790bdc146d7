"""The denoising UNet of latent diffusion (Rombach et al. 2022), with SD checkpoint names."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.attention import Attend, KeysValues, SpatialTransformer, Text, TransformerBlock, attend
from ldm.config import UNetConfig
from ldm.layers import Upsample


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of geometrically spaced frequencies, cosines first (Ho et al. 2020).

    Args:
        t: timesteps (b,).
        dim: width of the result, even.

    Returns:
        (b, dim) float32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions, the timestep added between them, and a residual connection."""

    def __init__(self, channels_in: int, emb_channels: int, channels_out: int):
        super().__init__()
        # The identities hold the places of parameterless layers in SD's numbering.
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, channels_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels_out), nn.SiLU(), nn.Identity(), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        )
        same = channels_in == channels_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (b, c_in, h, w), emb (b, emb_channels) -> (b, c_out, h, w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.ModuleList):
    """Layers in sequence, each given what it takes: timestep, text, or the features alone."""

    def forward(self, h: Tensor, emb: Tensor, text: Text, cross_attend: Attend | list[Attend]) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, text, cross_attend)
            else:
                h = layer(h)
        return h


@dataclass(frozen=True)
class CrossLayer:
    """Where a cross-attention layer is."""

    name: str  # its transformer block among the UNet's modules, such as input_blocks.1.1.transformer_blocks.0
    part: str  # input, middle or output
    factor: int  # a pixel of its map stands for factor x factor cells of the latent


def recomputed(block: nn.Module, *args: Text | Attend | list[Attend]) -> Tensor:
    """Call a block so that its inner activations are computed again in the backward pass (Chen et al. 2016)."""
    return checkpoint(block, *args, use_reentrant=False)


class UNet(nn.Module):
    """Noisy latent, timestep and text context -> predicted noise (or v)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.checkpointing = False  # compute the blocks again in the backward pass instead of keeping what is in them
        width = config.model_channels
        emb_channels = 4 * width
        widths = [int(width * mult) for mult in config.channel_mult]
        self.model_channels = width

        *depths, middle_depth = config.depths

        def transformer(channels: int, depth: int) -> SpatialTransformer:
            heads = channels // config.num_head_channels if config.num_head_channels else config.num_heads
            return SpatialTransformer(channels, config.context_dim, heads, depth, config.use_linear_in_transformer)

        def level_block(channels_in: int, channels_out: int, depth: int) -> Block:
            attention = [transformer(channels_out, depth)] if depth else []
            return Block([ResBlock(channels_in, emb_channels, channels_out), *attention])

        self.time_embed = nn.Sequential(nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        if config.adm_in_channels:
            embed = (nn.Linear(config.adm_in_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
            self.label_emb = nn.Sequential(nn.Sequential(*embed))  # nested as SDXL's checkpoints have it

        # Encoder. `skips` holds the widths that the decoder will take over, last first.
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        skips, channels = [width], width
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(level_block(channels, level_width, depths[level]))
                channels = level_width
                skips.append(channels)
            if level != len(widths) - 1:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)

        # Middle.
        self.middle_block = Block(
            [
                ResBlock(channels, emb_channels, channels),
                transformer(channels, middle_depth),
                ResBlock(channels, emb_channels, channels),
            ]
        )

        # Decoder.
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                block = level_block(channels + skips.pop(), level_width, depths[level])
                channels = level_width
                if level != 0 and i == config.num_res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(block)

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )

        for number, (_, transformer_block) in enumerate(self._transformer_blocks()):
            transformer_block.layer = number

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the network computes in."""
        return list(self.out.parameters())[-1].dtype

    def forward(
        self, x: Tensor, t: Tensor, context: Text, attend: Attend | list[Attend] = attend, vector: Tensor | None = None
    ) -> Tensor:
        """Predict the noise (or v) in x.

        Args:
            x: noisy latents (b, c, h, w).
            t: training timesteps (b,), 0 to 999.
            context: text context (b, l, context_dim), or its keys and values from `keys_values`.
            attend: the arithmetic of all cross-attention layers, or a list with that of each.
            vector: (b, adm_in_channels), for a UNet that is conditioned on one besides.

        Returns:
            (b, c, h, w).
        """
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        if vector is not None:
            emb = emb + self.label_emb(vector.to(x.dtype))
        run: Callable[..., Tensor] = recomputed if self.checkpointing and torch.is_grad_enabled() else Block.__call__

        # Encoder.
        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h, emb, context, attend)
            skips.append(h)

        # Middle.
        h = run(self.middle_block, h, emb, context, attend)

        # Decoder.
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1), emb, context, attend)
        return self.out(h)

    def keys_values(self, context: Tensor, weights: dict[str, Tensor] | None = None) -> list[KeysValues]:
        """Return the keys and values of a text context (b, l, context_dim) in every cross-attention layer.

        Args:
            weights: matrices in place of the UNet's own, by their names in it.
        """
        weights = weights or {}

        def matrix(name: str) -> Tensor | None:
            return weights[name].to(context) if name in weights else None

        return [
            block.attn2.keys_values(context, matrix(f"{name}.attn2.to_k.weight"), matrix(f"{name}.attn2.to_v.weight"))
            for name, block in self._transformer_blocks()
        ]

    def cross_layers(self) -> list[CrossLayer]:
        """Return where the cross-attention layers are, in the order they run."""
        layers, factor = [], 1
        for name, module in self.named_modules():
            if isinstance(module, TransformerBlock):
                layers.append(CrossLayer(name, name.partition("_")[0], factor))
            elif isinstance(module, Downsample):
                factor *= 2
            elif isinstance(module, Upsample):
                factor //= 2
        return layers

    def _transformer_blocks(self) -> Iterator[tuple[str, TransformerBlock]]:
        return ((name, block) for name, block in self.named_modules() if isinstance(block, TransformerBlock))
