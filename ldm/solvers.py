"""Solvers of the reverse diffusion: a schedule of timesteps, a pure step, and one loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.schedule import leading_timesteps, split_output

Denoise = Callable[[Tensor, int], Tensor]
"""(x, t) -> the model's output for x, guidance included; like x."""

Noise = Callable[[], Tensor]
"""Draws fresh N(0, 1) noise of the state's shape; called once per step where the solver is stochastic."""

Callback = Callable[[dict[str, Any]], None]
"""Gets {"x", "i", "t", "denoised"} after each step."""


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021), Eq. 12.

    Args:
        alphas_cumprod: of every training timestep (timesteps,).
        steps: number of solver steps.
        eta: 0 is deterministic, 1 is ancestral sampling.
        parameterization: what the model predicts, eps or v.
    """

    alphas_cumprod: Tensor
    steps: int
    eta: float = 0.0
    parameterization: str = "eps"
    timesteps: list[int] = field(init=False)  # noisiest first

    def __post_init__(self):
        object.__setattr__(self, "timesteps", leading_timesteps(self.steps, len(self.alphas_cumprod)))

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, output: Tensor, x: Tensor, i: int, history: None, noise: Tensor | None) -> tuple[Tensor, None, Tensor]:
        """Take step i from x, which may have any leading dimensions.

        Args:
            output: the model's output at x.
            history: unused; a solver of higher order keeps earlier outputs there.
            noise: N(0, 1) like x; needed when eta > 0.

        Returns:
            (x at the next timestep, history, predicted x_0).
        """
        alpha, alpha_next = self._alpha(i), self._alpha(i + 1)
        x_0, eps = split_output(output, x, alpha, self.parameterization)
        sigma = self.eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        x = alpha_next**0.5 * x_0 + (1 - alpha_next - sigma**2) ** 0.5 * eps
        return (x + sigma * noise if self.stochastic else x), None, x_0

    def branch(self, history: None, index: int) -> None:
        """Return the history of one entry of a stacked state."""
        return history

    def _alpha(self, i: int) -> float:
        """alphas_cumprod at the i-th timestep visited; after the last one, at timestep 0."""
        return float(self.alphas_cumprod[self.timesteps[i] if i < self.steps else 0])


def run(
    solver: DDIM,
    denoise: Denoise,
    x: Tensor,
    steps: range,
    history: Any = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Any]:
    """Take the given steps of a solver.

    Args:
        x: the state, of any shape that `denoise` understands.
        steps: which of the solver's steps to take; range(solver.steps) is all of them.
        history: what an earlier call returned, to go on from there.

    Returns:
        (x after the last step, history).
    """
    for i in steps:
        t = solver.timesteps[i]
        fresh = noise() if solver.stochastic else None
        x, history, denoised = solver.step(denoise(x, t), x, i, history, fresh)
        if callback is not None:
            callback({"x": x, "i": i, "t": t, "denoised": denoised})
    return x, history


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6, in the scale of Stable Diffusion)."""
    return unconditional + scale * (conditional - unconditional)


def timestep_rows(t: int, x: Tensor) -> Tensor:
    """The timestep of every row of x (b, ...): (b,)."""
    return torch.full(x.shape[:1], t, device=x.device, dtype=torch.long)
