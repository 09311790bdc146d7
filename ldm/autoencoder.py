"""AutoencoderKL: images <-> latents (Rombach et al. 2022, Sec. 3.1), with SD checkpoint names."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.attention import attend
from ldm.config import AutoencoderConfig
from ldm.layers import Upsample


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents: mean and log-variance, each (b, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw mean + std * noise; noise (b, c, h, w) is drawn from N(0, 1) when None."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to N(0, 1), summed over an image's latent: (b,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels; projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        return x + self.proj_out(rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, and the change of resolution that follows them, if any."""

    def __init__(self, widths: list[int], groups: int, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.block, *(m for n, m in self.named_children() if n != "block")):
            x = module(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (b, 3, f h, f w) -> moments (b, 2 z, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, width = config.num_groups, config.ch
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(config.ch_mult):
            widths = [width] + [config.ch * mult] * config.num_res_blocks
            width = widths[-1]
            last = i == len(config.ch_mult) - 1
            self.down.append(Level(widths, groups, **({} if last else {"downsample": Downsample(width)})))
        self.mid = Middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (b, z, h, w) -> image (b, 3, f h, f w). `up[0]` is the full resolution, as in SD."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, width = config.num_groups, config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        levels = []
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            widths = [width] + [config.ch * mult] * (config.num_res_blocks + 1)
            width = widths[-1]
            levels.append(Level(widths, groups, **({} if i == 0 else {"upsample": Upsample(width)})))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.to_pixels(self.mid(self.conv_in(z)))

    def to_pixels(self, h: Tensor) -> Tensor:
        """Hidden state of the latent's resolution (b, width, h, w) -> image: the local part, most of the work."""
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Encoder to a Gaussian posterior over latents, and decoder."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Posterior:
        """Images (b, 3, H, W) in [-1, 1] -> posterior over unscaled latents (b, c, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (b, c, h, w) -> images (b, 3, f h, f w), about [-1, 1], not clamped."""
        return self.decoder.to_pixels(self.to_hidden(z))

    def to_hidden(self, z: Tensor) -> Tensor:
        """The decoder up to and with its attention, which sees the whole image: (b, z, h, w) -> (b, width, h, w)."""
        return self.decoder.mid(self.decoder.conv_in(self.post_quant_conv(z)))
