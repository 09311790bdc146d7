"""Embedded colour profiles: what an image's numbers mean, brought to sRGB."""

import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

_SAME = 2  # of 255: profiles that differ from sRGB by less are sRGB
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
"""Colour space as a profile names it -> Pillow's mode."""


def to_srgb(image: Image.Image, profile: bytes | None, file: Path) -> Image.Image:
    """Convert an 8-bit image from its colour profile to sRGB; alpha stays as it is.

    A profile that cannot be used is left aside with a warning that names the file.

    Args:
        profile: ICC; None: sRGB already, except for Lab, which means the same everywhere.
    """
    colours = {"RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    if not profile and colours != "LAB":
        return image
    try:
        convert = _transform(profile, colours)
        converted = convert(image.convert(colours)) if convert else image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(
            f"{file}: its colour profile cannot be used ({reason}): its colours are taken to be sRGB", stacklevel=2
        )
        return image
    if convert and image.mode in ("RGBA", "LA"):
        converted.putalpha(image.getchannel("A"))
    return converted


def _transform(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return what converts images of a mode to sRGB; None where that changes nothing.

    Raises:
        PyCMSError, OSError, ValueError: no profile, or one for images of another kind.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
    space = source.profile.xcolor_space
    if _SPACES.get(space, space) != mode:
        raise ValueError(f"it is for {space.strip()}, the image is {mode}")
    target = ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(source, target, mode, "RGB", renderingIntent=intent, flags=flags)
    if mode in ("RGB", "L"):
        probe = Image.fromarray(_probe() if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        seen = np.asarray(_apply(probe, transform)).astype(int)
        if np.abs(seen - np.asarray(probe.convert("RGB")).astype(int)).max() <= _SAME:
            return None
    return partial(_apply, transform=transform)


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is only where the image itself is changed
    return converted


def _probe() -> np.ndarray:
    """Colours all over the cube: (1, 729, 3)."""
    steps = np.rint(np.linspace(0, 255, 9)).astype(np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
