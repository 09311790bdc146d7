"""The branches' predictions of the finished image, step by step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion import LatentDiffusion
from ldm.images import to_images
from ldm.runtime.decoding import decode


@dataclass(frozen=True)
class StepImages:
    """One image's predicted clean images at some steps."""

    steps: list[int]  # numbers of the calls of the UNet, from 0 on
    timesteps: list[int]  # training timesteps of those
    concept: list[Image.Image]
    auxiliary: list[Image.Image | None]  # None where the concept branch runs alone


class StepRecord:
    """Keeps the predicted clean latents of a batch on the CPU; `record` is a `Callback` of the sampler."""

    def __init__(self):
        self.timesteps: list[int] = []
        self.predicted: list[Tensor] = []  # (1 or 2 branches, b, c, h, w)

    def record(self, step: dict[str, Any]) -> None:
        """Add a step."""
        predicted = step["denoised"]
        self.timesteps.append(step["t"])
        self.predicted.append((predicted if predicted.dim() == 5 else predicted[None]).cpu())

    @property
    def dual_steps(self) -> int:
        """How many of the steps had both branches."""
        return sum(len(branches) == 2 for branches in self.predicted)

    @torch.inference_mode()
    def images(self, model: LatentDiffusion, row: int, steps: list[int]) -> StepImages:
        """Decode the predictions of one image.

        Args:
            row: of the batch.
            steps: which of the recorded ones.
        """
        latents = [branch for step in steps for branch in self.predicted[step][:, row]]
        pixels = torch.cat([decode(model, latent[None].to(model.device)) for latent in latents])
        decoded = iter(to_images(pixels))
        concept, auxiliary = [], []
        for step in steps:
            concept.append(next(decoded))
            auxiliary.append(next(decoded) if len(self.predicted[step]) == 2 else None)
        return StepImages(steps, [self.timesteps[step] for step in steps], concept, auxiliary)


def choose_steps(number: int, dual: int, most: int = 10) -> list[int]:
    """Choose steps to show: evenly over both phases, the first and the last of each among them.

    Args:
        number: of all steps.
        dual: how many of them, the first ones, have both branches.
        most: to choose.
    """
    if number <= most:
        return list(range(number))
    early = min(dual, most // 2 if dual < number else most)
    chosen = {*_even(0, dual, early), *_even(dual, number, most - early)}
    return sorted(chosen)


def _even(start: int, end: int, count: int) -> list[int]:
    return np.linspace(start, end - 1, min(count, end - start)).round().astype(int).tolist() if end > start else []
