"""The reverse diffusion's one loop: a solver, a way to denoise, and a state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.solvers import Solver

Denoise = Callable[[Tensor, int], Tensor]
"""(x, t) -> the model's output for x, guidance included; like x."""

Noise = Callable[[], Tensor]
"""Draws fresh N(0, 1) noise of the state's shape; called once per step where the solver is stochastic."""

After = Callable[[Tensor, int], Tensor]
"""(x after step i, i) -> x to go on with, such as one whose known part was put back."""

Callback = Callable[[dict[str, Any]], None]
"""Gets {"x", "i", "t", "denoised"} after each step."""


def solve(
    solver: Solver,
    denoise: Denoise,
    x: Tensor,
    steps: range,
    history: Any = None,
    noise: Noise | None = None,
    after: After | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Any]:
    """Take the given steps of a solver.

    Args:
        x: the state, of any shape that `denoise` understands.
        steps: which of the solver's steps to take; range(len(solver.timesteps)) is all of them.
        history: what an earlier call returned, to go on from there.

    Returns:
        (x after the last step, history).
    """
    for i in steps:
        t = solver.timesteps[i]
        fresh = noise() if noise is not None and solver.stochastic else None
        x, history, denoised = solver.step(denoise(x, t), x, i, history, fresh)
        if after is not None:
            x = after(x, i)
        if callback is not None:
            callback({"x": x, "i": i, "t": t, "denoised": denoised})
    return x, history


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6, in the scale of Stable Diffusion)."""
    return unconditional + scale * (conditional - unconditional)


def timestep_rows(t: int, x: Tensor) -> Tensor:
    """The timestep of every row of x (b, ...): (b,)."""
    return torch.full(x.shape[:1], t, device=x.device, dtype=torch.long)
