"""Masks as image editors and segmenters write them: which files are masks, and what is white in them."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.image_files import EXTENSIONS, orientation_of, read_file, turn

_NAME = re.compile(r"(?:mask[-_. ]+(?P<behind>.+)|(?P<before>.+?)[-_. ]+mask(?:label)?)", re.IGNORECASE)
"""Stems of masks: NAME.mask, NAME_mask, NAME-mask, NAME-masklabel (OneTrainer), mask_NAME, in capitals or not."""

_LABELS = 8  # different values, at most, that are labels of objects rather than shades
_NEAR = 32  # of 255: as good as black or white


def image_of(mask: str | Path) -> str | None:
    """Return the stem or name of the image that a file is the mask of, lower case; None: its name is not a mask's."""
    match = _NAME.fullmatch(Path(mask).stem)
    return (match["behind"] or match["before"]).lower() if match else None


def split_masks(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return the images and the masks among the image files of a folder.

    A name such as old_mask.png is a mask's where old.* lies beside it, or other images that are none; in a folder of
    nothing else it is an image's, of a mask to wear.
    """
    files = list(files)
    images = [file for file in files if image_of(file) is None]
    masks = [file for file in files if image_of(file) is not None]
    if not images:  # mask_mask.png is the mask of mask_*.png then
        known = _names(files)
        masks = [file for file in files if image_of(file) in known or _is_surely_mask(file)]
        images = [file for file in files if file not in masks]
    return images, masks


def _is_surely_mask(file: Path) -> bool:
    stem = file.stem.lower()
    return image_of(file) is not None and stem.endswith(("masklabel", ".mask"))


def _names(files: Iterable[Path]) -> set[str]:
    return {name.lower() for file in files for name in (file.stem, file.name)}


def mask_of(image: str | Path) -> Path | None:
    """Return the mask file beside an image, if there is one.

    Raises:
        UserError: there are several.
    """
    masks = masks_of([Path(image)])
    if len(masks) > 1:
        names = " and ".join(file.name for file in masks)
        raise UserError(f"{image} has several masks, {names}: keep one of them")
    return masks[0] if masks else None


def masks_of(images: Iterable[Path]) -> list[Path]:
    """Return the mask files beside images of one folder."""
    images = list(images)
    own = _names(images)
    masks = [file for folder in {image.parent for image in images} for file in _masks_in(folder)]
    return [file for file in masks if image_of(file) in own and file not in images]


def _masks_in(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in EXTENSIONS)
    return [file for file in files if not file.name.startswith(".") and image_of(file) is not None]


def read_mask(file: str | Path, image: Image.Image, image_file: str | Path | None = None) -> Image.Image:
    """Read an image's mask, in whatever form it is: 8-bit grey of the image's size, white is what it marks.

    Args:
        image: the image, upright.
        image_file: where it was read from; a mask that was drawn before the image was turned by its EXIF
            orientation is turned with it.

    Raises:
        UserError: the file is not readable, is no mask, or has another size.
    """
    mask = read_file(file, lambda decoded: decoded.image)
    if image_file is not None and mask.size != image.size and mask.size == image.size[::-1]:
        mask = turn(mask, orientation_of(image_file))
    check_size(mask, image, str(file), Path(image_file or "").name)
    return as_mask(mask, str(file))


def check_size(mask: Image.Image, image: Image.Image, name: str = "the mask", of: str = "") -> None:
    """Raise UserError for a mask of another size than its image."""
    if mask.size != image.size:
        raise UserError(
            f"{name} is {mask.width} x {mask.height} px, its image {of + ' ' if of else ''}"
            f"{image.width} x {image.height}: give a mask of the image's size"
        )


def as_mask(image: Image.Image, name: str = "the mask") -> Image.Image:
    """Return an image of any mode as a mask: 8-bit grey, the brightest value 255.

    Where its transparency varies, it gives what is marked: opaque is, unless black and white are drawn on it.
    Otherwise the colours do, white is marked; the values may be 0 and 1, or of 16 bits.

    Args:
        name: of the mask, for messages.

    Raises:
        UserError: it has one value throughout, no black, or several labels.
    """
    values = _values(image)
    expected = "expected white (or opaque) where it marks the image, black (or transparent) elsewhere"
    if not np.isfinite(values).all() or (values < 0).any():
        raise UserError(f"{name} is no mask, it has negative values or such that are no numbers: {expected}")
    low, high = values.min(), values.max()
    if low == high:
        what = f"{high:g} throughout" if high else "empty"
        raise UserError(f"{name} is no mask, it is {what}: {expected}")
    if 4 * low >= high:
        raise UserError(f"{name} is no mask, its values go from {low:g} to {high:g}: {expected}")
    if labels := _labels(image, values):
        raise UserError(f"{name} is no mask but has {labels} labels: give a mask of one object; {expected}")
    return Image.fromarray(np.rint(values * (255 / high)).astype(np.uint8))


def _labels(image: Image.Image, values: np.ndarray) -> int:
    """How many labels of several objects an image has in place of shades; 0: none."""
    if not image.mode.startswith(("I", "F")) and not image.has_transparency_data:
        rgb = image.convert("RGB")
        colours = rgb.getcolors(_LABELS) or []
        if len(colours) > 2 and np.ptp(np.asarray(rgb).astype(int), axis=-1).max() > _NEAR:
            return len(colours)
    different = len(np.unique(values))
    return different if 2 < different <= _LABELS and values.max() < 128 else 0


def _values(image: Image.Image) -> np.ndarray:
    """What marks the image, from 0 on, in whatever unit the file has: (h, w)."""
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image).astype(np.float64)
    if not image.has_transparency_data:
        return np.asarray(image.convert("L")).astype(np.float64)
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A")).astype(np.float64)
    grey = np.asarray(rgba.convert("RGB").convert("L")).astype(np.float64)
    if alpha.max() - alpha.min() <= _NEAR:  # lossy formats make nearly opaque of opaque
        return grey if alpha.max() > _NEAR else np.zeros_like(alpha)
    opaque = grey[alpha >= 255 - _NEAR]
    dark, bright = (opaque <= _NEAR).mean() if opaque.size else 0, (opaque >= 255 - _NEAR).mean() if opaque.size else 0
    drawn = dark and bright and dark + bright > 0.95
    return grey * alpha / 255 if drawn else alpha
