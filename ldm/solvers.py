"""Solvers of the reverse diffusion: the timesteps that each visits, and its step, a pure function.

All of them see the state x as the UNet sees it, sqrt(alpha) x_0 + sqrt(1 - alpha) noise, so that
they can be exchanged, started from an image, and stacked. A step may have any leading dimensions.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ldm.schedule import (
    check_steps,
    falling,
    karras_sigmas,
    leading_timesteps,
    linspace_timesteps,
    split_output,
    trailing_timesteps,
)

Step = tuple[Tensor, Any, Tensor]
"""(x at the next timestep, history, predicted x_0)."""

SPACINGS = {"leading": leading_timesteps, "trailing": trailing_timesteps, "linspace": linspace_timesteps}
"""Ways to space a solver's timesteps: from 1 on, from the noisiest on, or from one end to the other."""

SMALLEST_ALPHA = 2.0**-24
"""Stands for the alpha of pure noise where a solver divides by it."""


@dataclass(frozen=True)
class Solver:
    """What all solvers share.

    Args:
        alphas_cumprod: of every training timestep (timesteps,).
        steps: number of solver steps.
        eta: 0 is deterministic, 1 is ancestral sampling; DDIM's alone.
        parameterization: what the model predicts, eps or v.
        spacing: of the timesteps, a name in `SPACINGS`; None: the one that the solver is known with.
        skip: how many of the first steps to leave out, to start from a noisy image.

    From step to step the noise falls. So do the timesteps, but that the second step of PLMS is its first
    one's other half, and that Karras et al.'s noise levels are rounded to timesteps that may repeat.
    """

    alphas_cumprod: Tensor
    steps: int
    eta: float = 0.0
    parameterization: str = "eps"
    spacing: str | None = None
    skip: int = 0
    timesteps: list[int] = field(init=False)  # where the model is called, noisiest first
    alphas: list[float] = field(init=False)  # of the state before each of those calls, and at the end

    ends_clean: ClassVar[bool] = True  # at alpha 1; otherwise at training timestep 0's
    usual_spacing: ClassVar[str] = "leading"

    def __post_init__(self):
        object.__setattr__(self, "spacing", self.spacing or self.usual_spacing)
        timesteps = falling(self._spaced())[self.skip :]
        end = 1.0 if self.ends_clean else float(self.alphas_cumprod[0])
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "alphas", [*(self._alpha(t) for t in timesteps), end])

    @property
    def stochastic(self) -> bool:
        """Whether steps take fresh noise."""
        return False

    @property
    def initial_scale(self) -> float:
        """Factor on N(0, 1) noise that makes the first state."""
        return 1.0

    def step(self, output: Tensor, x: Tensor, i: int, history: Any, noise: Tensor | None) -> Step:
        """Take step i from x.

        Args:
            output: the model's output at x, like x.
            history: what the step before returned; None at first.
            noise: N(0, 1) like x; needed by stochastic solvers.
        """
        raise NotImplementedError

    def branch(self, history: Any, index: int) -> Any:
        """Return the history of one entry of a stacked state."""
        return history

    def _spaced(self) -> list[int]:
        return SPACINGS[self.spacing or self.usual_spacing](self.steps, len(self.alphas_cumprod))

    def _alpha(self, t: int) -> float:
        return max(float(self.alphas_cumprod[t]), SMALLEST_ALPHA)

    def _split(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return split_output(output, x, self.alphas[i], self.parameterization)


@dataclass(frozen=True)
class DDIM(Solver):
    """Denoising diffusion implicit models (Song et al. 2021), Eq. 12."""

    ends_clean = False

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, output: Tensor, x: Tensor, i: int, history: Any, noise: Tensor | None) -> Step:
        alpha, alpha_next = self.alphas[i], self.alphas[i + 1]
        x_0, eps = self._split(output, x, i)
        sigma = self.eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        x = alpha_next**0.5 * x_0 + (1 - alpha_next - sigma**2) ** 0.5 * eps
        return (x + sigma * noise if self.stochastic else x), None, x_0

    def _alpha(self, t: int) -> float:
        # A v-prediction needs no division by alpha: pure noise may be just that.
        return float(self.alphas_cumprod[t]) if self.parameterization == "v" else super()._alpha(t)


@dataclass(frozen=True)
class PLMS(Solver):
    """Pseudo linear multistep (Liu et al. 2022), Eq. 12, with a trapezoid for the first step.

    The first step calls the model twice, so one more timestep is visited than there are steps. The
    history is (state that the first step started from, up to three earlier outputs).
    """

    ends_clean = False

    def __post_init__(self):
        super().__post_init__()
        if len(self.timesteps) > 1:
            object.__setattr__(self, "timesteps", [*self.timesteps[:2], *self.timesteps[1:]])
            object.__setattr__(self, "alphas", [*self.alphas[:2], *self.alphas[1:]])

    def step(
        self, output: Tensor, x: Tensor, i: int, history: tuple[Tensor, list[Tensor]] | None, noise: Tensor | None
    ) -> Step:
        start, outputs = history or (x, [])
        if i == 1:
            # The trapezoid's second half: again from the start, with the mean of both ends.
            x, x_0 = self._transfer((output + outputs[-1]) / 2, start, 0, 1)
            return x, (x, outputs), x_0
        outputs = [*outputs[-3:], output]
        weights = _ADAMS_BASHFORTH[len(outputs) - 1]
        combined = weights[0] * output
        for weight, past in zip(weights[1:], reversed(outputs[:-1]), strict=True):
            combined = combined + weight * past
        following, x_0 = self._transfer(combined, x, i, i + 1)
        return following, (x, outputs), x_0

    def branch(self, history: tuple[Tensor, list[Tensor]] | None, index: int) -> tuple[Tensor, list[Tensor]] | None:
        return history and (history[0][index], [output[index] for output in history[1]])

    def _transfer(self, output: Tensor, x: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Go from the i-th state to the j-th along a constant output: (x, predicted x_0)."""
        x_0, eps = self._split(output, x, i)
        return self.alphas[j] ** 0.5 * x_0 + (1 - self.alphas[j]) ** 0.5 * eps, x_0


_ADAMS_BASHFORTH: list[list[float]] = [
    [1],
    [3 / 2, -1 / 2],
    [23 / 12, -16 / 12, 5 / 12],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
]
"""Weights of the newest and of earlier outputs, by how many there are."""


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++ (2M) (Lu et al. 2022b), Algorithm 2; first order in the first and last step.

    The history is the x_0 predicted a step before.
    """

    usual_spacing = "linspace"

    def step(self, output: Tensor, x: Tensor, i: int, history: Tensor | None, noise: Tensor | None) -> Step:
        alpha, alpha_next = self.alphas[i], self.alphas[i + 1]
        x_0, _ = self._split(output, x, i)
        if i == len(self.timesteps) - 1:
            return x_0, x_0, x_0
        h = _log_snr(alpha_next) - _log_snr(alpha)
        target = x_0
        if history is not None:
            r = (_log_snr(alpha) - _log_snr(self.alphas[i - 1])) / h
            target = x_0 + (x_0 - history) / (2 * r)
        x = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * x - alpha_next**0.5 * math.expm1(-h) * target
        return x, x_0, x_0

    def branch(self, history: Tensor | None, index: int) -> Tensor | None:
        return None if history is None else history[index]

    def _spaced(self) -> list[int]:
        if self.spacing == "trailing":
            return super()._spaced()
        # One interval more than steps, as in diffusers, whose numbers users know; the last one goes to the clean image.
        trained = len(self.alphas_cumprod)
        check_steps(self.steps, trained)
        if self.spacing == "linspace":
            return [int(t) for t in np.linspace(0, trained - 1, self.steps + 1).round()[:0:-1]]
        interval = max(trained // (self.steps + 1), 1)
        return [min(i * interval + 1, trained - 1) for i in range(self.steps, 0, -1)]


@dataclass(frozen=True)
class DPMpp2MKarras(DPMpp2M):
    """DPM-Solver++ (2M) at the noise levels of Karras et al. 2022, over the whole of the training's range."""

    def __post_init__(self):
        check_steps(self.steps, len(self.alphas_cumprod))
        alphas = self.alphas_cumprod.double().clamp(min=SMALLEST_ALPHA).numpy()
        trained = ((1 - alphas) / alphas) ** 0.5
        sigmas = karras_sigmas(self.steps, trained[0], trained[-1])[self.skip :]
        nearest = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained))).round()
        object.__setattr__(self, "timesteps", [int(t) for t in nearest])
        object.__setattr__(self, "alphas", [*(1 / (1 + sigmas**2)).tolist(), 1.0])


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method in Karras et al.'s variables (2022, Algorithm 2 without churn); ends without noise."""

    def step(self, output: Tensor, x: Tensor, i: int, history: Any, noise: Tensor | None) -> Step:
        alpha_next = self.alphas[i + 1]
        x_0, eps = self._split(output, x, i)
        return alpha_next**0.5 * x_0 + (1 - alpha_next) ** 0.5 * eps, None, x_0

    @property
    def stochastic(self) -> bool:
        """Whether steps take fresh noise."""
        return False

    @property
    def initial_scale(self) -> float:
        # Karras et al. start from sigma * noise; with leading timesteps diffusers, whose numbers users
        # know, starts from sqrt(sigma^2 + 1) * noise. Here both are divided by sqrt(sigma^2 + 1).
        return 1.0 if self.spacing == "leading" else (1 - self.alphas[0]) ** 0.5


@dataclass(frozen=True)
class EulerAncestral(Euler):
    """Euler's method with fresh noise after each step: down to sigma_down, up again to the next sigma."""

    stochastic = True

    def step(self, output: Tensor, x: Tensor, i: int, history: Any, noise: Tensor | None) -> Step:
        alpha_next = self.alphas[i + 1]
        x_0, eps = self._split(output, x, i)
        variance, following = (1 / alpha - 1 for alpha in (self.alphas[i], alpha_next))  # sigma^2
        up = following * (variance - following) / variance
        scaled = x_0 + (following - up) ** 0.5 * eps + up**0.5 * noise
        return alpha_next**0.5 * scaled, None, x_0


def _log_snr(alpha: float) -> float:
    """Half the logarithm of the signal-to-noise ratio: lambda of Lu et al."""
    return 0.5 * math.log(alpha / (1 - alpha))


SOLVERS: dict[str, type[Solver]] = {
    "ddim": DDIM,
    "plms": PLMS,
    "dpm++2m": DPMpp2M,
    "dpm++2m-karras": DPMpp2MKarras,
    "euler": Euler,
    "euler-a": EulerAncestral,
}
"""Every solver under the name that the programs and configurations know it by."""
