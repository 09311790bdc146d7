"""The noise schedule of training, and the timesteps that a solver visits."""

import numpy as np
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import UserError


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """Cumulative products of 1 - beta_t (Ho et al. 2020, Sec. 2): (timesteps,) float32.

    The betas are linear in their square roots, as in Stable Diffusion.
    """
    betas = np.linspace(config.linear_start**0.5, config.linear_end**0.5, config.timesteps) ** 2
    return torch.from_numpy(np.cumprod(1 - betas)).float()


def q_sample(x_0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Diffuse x_0 (Ho et al. 2020, Eq. 4): sqrt(alpha) x_0 + sqrt(1 - alpha) noise.

    Args:
        x_0: clean latents (b, c, h, w).
        noise: (b, c, h, w).
        alpha: alphas_cumprod at each row's timestep (b,).
    """
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise


def training_target(x_0: Tensor, noise: Tensor, alpha: Tensor, parameterization: str) -> Tensor:
    """What the UNet should predict: the noise, or v = sqrt(alpha) noise - sqrt(1 - alpha) x_0."""
    if parameterization == "eps":
        return noise
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0


def split_output(output: Tensor, x: Tensor, alpha: float, parameterization: str) -> tuple[Tensor, Tensor]:
    """Return (predicted x_0, predicted noise) from the UNet's output at x.

    Args:
        output: noise or v (Salimans & Ho 2022, App. D), like x.
        x: noisy latents (b, c, h, w).
        alpha: alphas_cumprod at x's timestep.
        parameterization: eps or v.
    """
    a, s = alpha**0.5, (1 - alpha) ** 0.5
    if parameterization == "eps":
        return (x - s * output) / a, output
    return a * x - s * output, a * output + s * x


def leading_timesteps(steps: int, timesteps: int = 1000) -> list[int]:
    """The training timesteps that `steps` solver steps visit, noisiest first.

    Evenly spaced from 1 on: 50 steps visit 981, 961, ..., 1, as Stable Diffusion's samplers do.

    Raises:
        UserError: steps is not in 1 .. timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps: expected 1 to {timesteps}")
    offset = 0 if steps == timesteps else 1
    return [i * timesteps // steps + offset for i in reversed(range(steps))]
