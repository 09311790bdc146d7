"""LatentDiffusion: the three networks of a text-to-image model under SD's checkpoint names."""

import torch
from torch import Tensor, nn

from ldm import schedule
from ldm.attention import Attend, attend
from ldm.autoencoder import AutoencoderKL
from ldm.config import ModelConfig
from ldm.text_encoder import CLIPTextEncoder
from ldm.unet import UNet


class LatentDiffusion(nn.Module):
    """UNet (`model.diffusion_model`), VAE (`first_stage_model`) and text encoder (`cond_stage_model`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.diffusion_model = UNet(config.unet)
        self.first_stage_model = AutoencoderKL(config.autoencoder)
        self.cond_stage_model = CLIPTextEncoder(config.text_encoder)
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod(config.schedule), persistent=False)

    @property
    def unet(self) -> UNet:
        return self.model.diffusion_model

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.first_stage_model

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        return self.cond_stage_model

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latent of a picture of height x width pixels."""
        f = self.config.autoencoder.downsampling
        return self.config.autoencoder.embed_dim, height // f, width // f

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (b, 3, H, W) in [-1, 1] -> scaled latents (b, c, h, w), sampled from the posterior."""
        return self.config.latent_scale * self.autoencoder.encode(pictures).sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) -> pictures (b, 3, H, W) in [-1, 1]."""
        return self.autoencoder.decode(latents / self.config.latent_scale).clamp(-1, 1)

    def predict(self, x: Tensor, t: Tensor, context: Tensor, attend: Attend = attend) -> Tensor:
        """The UNet's output (noise or v) for noisy latents x (b, c, h, w) at timesteps t (b,)."""
        return self.unet(x, t, context, attend)
