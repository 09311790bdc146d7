"""Noise that belongs to an image: the same whatever batch, order or process it is made in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.runtime.device_memory import upload


def fitting_seed(seed: int, bits: int) -> int:
    """Return a seed of at most so many bits (32 or 64): itself where it fits, else one that depends on all of it."""
    return seed if seed < 2**bits else int(np.random.SeedSequence(seed).generate_state(1)[0])


class ImageNoise:
    """Independent N(0, 1) streams, one for each image of a batch.

    Args:
        seed: the user's seed, not negative; or each image's own.
        indices: each image's number under its seed.
        shape: of one image's latent (c, h, w).
        stream: further streams of the same images, such as another branch's.
    """

    def __init__(
        self,
        seed: int | Sequence[int],
        indices: list[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        stream: int = 0,
    ):
        self.shape, self.device = shape, device
        seeds = [seed] * len(indices) if isinstance(seed, int) else seed
        self.generators = [
            torch.Generator().manual_seed(int(np.random.SeedSequence((own, index, stream)).generate_state(1)[0]))
            for own, index in zip(seeds, indices, strict=True)
        ]

    def __call__(self) -> Tensor:
        """Draw the next noise of every image (b, c, h, w). Always drawn on the CPU, then moved."""
        return upload(torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]), self.device)
