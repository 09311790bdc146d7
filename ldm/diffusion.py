"""LatentDiffusion: the three networks of a text-to-image model under SD's checkpoint names."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm import schedule
from ldm.attention import Attend, KeysValues, Text, attend
from ldm.autoencoder import AutoencoderKL, Posterior
from ldm.conditioning import Conditioning, conditioning
from ldm.config import ModelConfig
from ldm.text_encoder import TextEncoder, build_text_encoder
from ldm.text_pair import PairedTextEncoder
from ldm.unet import UNet


class LatentDiffusion(nn.Module):
    """UNet (`model.diffusion_model`), VAE (`first_stage_model`), text encoder (`cond_stage_model`; SDXL: `conditioner`)."""

    model: Any  # holds the UNet under SD's name
    alphas_cumprod: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.loaded_fingerprint: str | None = None  # of the file, where the weights were rounded in loading
        self.applied: str | None = None  # what has taken the place of loaded weights, until it is taken off
        self.static_shapes = False  # the UNet was compiled: tensors of another shape would have it compiled again
        self.model = nn.Module()
        self.model.diffusion_model = UNet(config.unet)
        self.first_stage_model = AutoencoderKL(config.autoencoder)
        if config.text_encoder_2 is None:
            self.cond_stage_model = build_text_encoder(config.text_encoder)
        else:
            self.conditioner = PairedTextEncoder(config)
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod(config.schedule), persistent=False)

    def _apply(self, *args, **kwargs):
        """Move or cast the networks; the schedule moves along but keeps its precision, which steps depend on.

        Nor is an autoencoder cast to fp16 that overflows in it.
        """
        exact = self.alphas_cumprod
        before = {name: weight.data for name, weight in self.autoencoder.named_parameters()}
        super()._apply(*args, **kwargs)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        if self.config.autoencoder.force_upcast and self.vae_dtype == torch.float16:
            for name, weight in self.autoencoder.named_parameters():
                weight.data = before[name].to(weight.device, torch.float32)
        return self

    @property
    def unet(self) -> UNet:
        """The denoiser, whose parameters have the names of SD's `model.diffusion_model`."""
        return self.model.diffusion_model

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The VAE between pixels and latents."""
        return self.first_stage_model

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of prompts; SDXL's is a pair of encoders behind one interface."""
        return self.conditioner if hasattr(self, "conditioner") else self.cond_stage_model

    @property
    def device(self) -> torch.device:
        """The device of the noise schedule, which moves along with the networks."""
        return self.alphas_cumprod.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the UNet computes in, and the other networks but for an autoencoder that cannot."""
        return self.unet.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """The precision that the autoencoder computes in."""
        return self.first_stage_model.post_quant_conv.weight.dtype

    def vae_precision(self) -> AbstractContextManager:
        """What the autoencoder runs in: where it overflows in fp16, outside of any autocast, in its own precision."""
        upcast = self.config.autoencoder.force_upcast
        return torch.autocast(self.device.type, enabled=False) if upcast else nullcontext()

    def posterior(self, images: Tensor) -> Posterior:
        """Images (b, 3, H, W) in [-1, 1] -> the posterior of their unscaled latents."""
        with self.vae_precision():
            return self.autoencoder.encode(images.to(self.vae_dtype) if self.config.autoencoder.force_upcast else images)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latent of a picture of height x width pixels."""
        f = self.config.autoencoder.downsampling
        return self.config.autoencoder.embed_dim, height // f, width // f

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w), sampled from the posterior."""
        return self.config.latent_scale * self.posterior(images).sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) -> images (b, 3, H, W) in [-1, 1]."""
        with self.vae_precision():
            pixels = self.autoencoder.decode(latents.to(self.vae_dtype) / self.config.latent_scale)
        return pixels.to(latents.dtype).clamp(-1, 1)

    def keys_values(self, context: Tensor, weights: dict[str, Tensor] | None = None) -> list[KeysValues]:
        """Text context (b, l, d) -> its keys and values in every cross-attention layer, for `predict`.

        They do not depend on the timestep: sampling works them out once.

        Args:
            weights: matrices in place of the model's own, by their names in it.
        """
        prefix = "model.diffusion_model."
        own = {name.removeprefix(prefix): matrix for name, matrix in (weights or {}).items()}
        return self.unet.keys_values(context.to(self.unet.dtype), own)

    def read(self, text: Tensor | Conditioning, weights: dict[str, Tensor] | None = None) -> Conditioning:
        """Work the keys and values of a text's context out, once for all steps; see `keys_values`."""
        given = conditioning(text)
        return Conditioning(self.keys_values(given.tensor, weights), given.vector)

    def predict(self, x: Tensor, t: Tensor, text: Text | Conditioning, attend: Attend | list[Attend] = attend) -> Tensor:
        """The UNet's output (noise or v) for noisy latents x (b, c, h, w) at timesteps t (b,), in x's precision.

        Args:
            text: a context, its keys and values, or a conditioning with either.
        """
        weights = self.unet.dtype
        context, vector = conditioning(text).to(weights)
        # A copy in any case: the next call writes a CUDA graph's output anew.
        return self.unet(x.to(weights), t, context, attend, vector).to(x.dtype, copy=True)
