"""LatentDiffusion: the three networks of a text-to-image model under SD's checkpoint names."""

import torch
from torch import Tensor, nn

from ldm import schedule
from ldm.attention import Attend, KeysValues, Text, attend
from ldm.autoencoder import AutoencoderKL
from ldm.config import ModelConfig
from ldm.text_encoder import TextEncoder, build_text_encoder
from ldm.unet import UNet


class LatentDiffusion(nn.Module):
    """UNet (`model.diffusion_model`), VAE (`first_stage_model`) and text encoder (`cond_stage_model`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.loaded_fingerprint: str | None = None  # of the file, where the weights were rounded in loading
        self.static_shapes = False  # the UNet was compiled: tensors of another shape would have it compiled again
        self.model = nn.Module()
        self.model.diffusion_model = UNet(config.unet)
        self.first_stage_model = AutoencoderKL(config.autoencoder)
        self.cond_stage_model = build_text_encoder(config.text_encoder)
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod(config.schedule), persistent=False)

    def _apply(self, *args, **kwargs):
        """Move or cast the networks; the schedule moves along but keeps its precision, which steps depend on."""
        exact = self.alphas_cumprod
        super()._apply(*args, **kwargs)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self

    @property
    def unet(self) -> UNet:
        return self.model.diffusion_model

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.first_stage_model

    @property
    def text_encoder(self) -> TextEncoder:
        return self.cond_stage_model

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the networks compute in."""
        return self.first_stage_model.post_quant_conv.weight.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latent of a picture of height x width pixels."""
        f = self.config.autoencoder.downsampling
        return self.config.autoencoder.embed_dim, height // f, width // f

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w), sampled from the posterior."""
        return self.config.latent_scale * self.autoencoder.encode(pictures).sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) -> pictures (b, 3, H, W) in [-1, 1]."""
        return self.autoencoder.decode(latents.to(self.dtype) / self.config.latent_scale).to(latents.dtype).clamp(-1, 1)

    def keys_values(self, context: Tensor, weights: dict[str, Tensor] | None = None) -> list[KeysValues]:
        """Text context (b, l, d) -> its keys and values in every cross-attention layer, for `predict`.

        They do not depend on the timestep: sampling works them out once.

        Args:
            weights: matrices in place of the model's own, by their names in it.
        """
        prefix = "model.diffusion_model."
        own = {name.removeprefix(prefix): matrix for name, matrix in (weights or {}).items()}
        return self.unet.keys_values(context.to(self.unet.out[-1].weight.dtype), own)

    def predict(self, x: Tensor, t: Tensor, context: Text, attend: Attend | list[Attend] = attend) -> Tensor:
        """The UNet's output (noise or v) for noisy latents x (b, c, h, w) at timesteps t (b,), in x's precision."""
        weights = self.unet.out[-1].weight.dtype
        context = context.to(weights) if isinstance(context, Tensor) else context
        # A copy in any case: the next call writes a CUDA graph's output anew.
        return self.unet(x.to(weights), t, context, attend).to(x.dtype, copy=True)
