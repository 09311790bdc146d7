"""Aspect ratios: sizes of about the same area as the square that a model was trained at (Podell et al. 2023, Sec. 2.3)."""

import math
from functools import lru_cache

from PIL import Image, ImageOps

from ldm.conditioning import ImageSize

LEAST_AREA = 0.9  # of the square's


@lru_cache(maxsize=16)
def buckets(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return the usual sizes (height, width) of a model that was trained at side x side pixels.

    At 1024 px these are SDXL's: multiples of 64 from half the side to twice, and at most a tenth smaller than the square.

    Args:
        multiple: what the sides must be multiples of, at least.
    """
    step = max(side // 16 // multiple, 1) * multiple
    sides = range(step * math.ceil(side / 2 / step), 2 * side + 1, step)
    return tuple((h, w) for h in sides for w in sides if LEAST_AREA * side**2 <= h * w <= side**2)


def nearest_bucket(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Return the usual size whose aspect ratio is nearest to an image's; of equal ones the larger."""
    ratio = math.log(height / width)
    return min(
        buckets(side, multiple), key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 6), -size[0] * size[1])
    )


def cut(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the largest part of that shape from the middle of an image and resize it to height x width pixels."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def size_condition(image: Image.Image, height: int, width: int) -> ImageSize:
    """The size condition of an image that `cut` made: its own size, and what was cut off once it was resized."""
    scale = max(height / image.height, width / image.width)
    top, left = (max(round((scale * own - new) / 2), 0) for own, new in ((image.height, height), (image.width, width)))
    return ImageSize((image.height, image.width), (top, left), (height, width))
