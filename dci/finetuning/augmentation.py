"""Custom Diffusion's random resize (Kumari et al. 2023, Sec. 3.2): other sizes, and words that say so."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALL_WORDS = ("far away", "very small")  # in front of the caption, for an image much smaller than the canvas
LARGE_WORDS = ("zoomed in", "close up")  # for one that is larger

SHRINK_SHARE = 0.66  # how often an image is made smaller rather than larger
SMALLEST, LARGEST = 1 / 3, 1.4  # sides, as shares of the canvas
ENLARGE_FROM = 1.2  # larger images are at least so large
SMALL_BELOW = 0.6  # below this share the caption says that it is small


@dataclass(frozen=True)
class Placement:
    """A square image on a square canvas."""

    side: int  # pixels of the resized image
    top: int  # of the image on the canvas, or of the canvas on a larger image
    left: int
    caption_prefix: str  # for the front of the caption; may be empty

    @staticmethod
    def sample(random: np.random.Generator, size: int) -> "Placement":
        """Sample a placement on a canvas of size x size pixels, with the published odds."""
        if random.random() < SHRINK_SHARE:
            side = int(random.integers(round(SMALLEST * size), size + 1))
        else:
            side = int(random.integers(round(ENLARGE_FROM * size), round(LARGEST * size)))
        top, left = (int(x) for x in random.integers(0, abs(size - side) + 1, 2))
        prefix = ""
        if side < SMALL_BELOW * size:
            prefix = str(random.choice(SMALL_WORDS))
        elif side > size:
            prefix = str(random.choice(LARGE_WORDS))
        return Placement(side, top, left, prefix)

    def place(self, image: Tensor, size: int) -> Tensor:
        """Resize a square image (c, s, s) and put it on a canvas of zeros, or cut it: (c, size, size)."""
        interpolate = torch.nn.functional.interpolate
        resized = interpolate(image[None], (self.side, self.side), mode="bicubic", antialias=True)[0]
        if self.side > size:
            return resized[:, self.top : self.top + size, self.left : self.left + size]
        canvas = image.new_zeros(len(image), size, size)
        canvas[:, self.top : self.top + self.side, self.left : self.left + self.side] = resized
        return canvas

    def valid(self, size: int, downsampling: int) -> Tensor:
        """Which latent cells hold the image and nothing of its border: 0 or 1, (1, h, w).

        As published, a cell is left out at each edge, for the encoder looks beyond a cell.
        """
        cells = size // downsampling
        if self.side > size:
            return torch.ones(1, cells, cells)
        rows, columns = (
            slice(start // downsampling + 1, (start + self.side) // downsampling - 1) for start in (self.top, self.left)
        )
        mask = torch.zeros(1, cells, cells)
        mask[:, rows, columns] = 1
        return mask
