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
    alphas = torch.from_numpy(np.cumprod(1 - betas))
    return (zero_terminal_snr(alphas) if config.zero_terminal_snr else alphas).float()


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Rescale alphas_cumprod (timesteps,) so that the last is 0: pure noise (Lin et al. 2024, Algorithm 1).

    The first stays as it is; the square roots are shifted and scaled.
    """
    roots = alphas.double().sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return (roots**2).to(alphas.dtype)


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
    """Return what the UNet should predict (b, c, h, w): the noise, or v = sqrt(alpha) noise - sqrt(1 - alpha) x_0.

    Args:
        x_0, noise, alpha: as for `q_sample`.
        parameterization: eps or v.
    """
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
    check_steps(steps, timesteps)
    offset = 0 if steps == timesteps else 1
    return [i * timesteps // steps + offset for i in reversed(range(steps))]


def trailing_timesteps(steps: int, timesteps: int = 1000) -> list[int]:
    """Timesteps evenly spaced from the noisiest on: 50 steps visit 999, 979, ..., 19 (Lin et al. 2024, Sec. 3.3).

    Raises:
        UserError: steps is not in 1 .. timesteps.
    """
    check_steps(steps, timesteps)
    return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]


def linspace_timesteps(steps: int, timesteps: int = 1000) -> list[int]:
    """Timesteps from the noisiest to the first one, both included: 5 steps visit 999, 749, 500, 250, 0.

    Raises:
        UserError: steps is not in 1 .. timesteps.
    """
    check_steps(steps, timesteps)
    return [int(t) for t in np.linspace(timesteps - 1, 0, steps).round()]


def falling(visited: list[int]) -> list[int]:
    """Push a timestep that rounding has made equal to the one before it down, so that all of them fall."""
    fallen: list[int] = []
    for t in visited:
        fallen.append(min(t, fallen[-1] - 1) if fallen else t)
    return fallen


def check_steps(steps: int, timesteps: int) -> None:
    """Raise UserError for a number of steps that is not in 1 .. timesteps."""
    if not 1 <= steps <= timesteps:
        raise UserError(f"steps {steps}: expected 1 to {timesteps}")


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Noise levels that crowd at the clean end (Karras et al. 2022, Eq. 5): (steps,), noisiest first."""
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
