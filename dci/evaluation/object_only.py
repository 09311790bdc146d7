"""Images of the object alone: whatever its mask leaves out becomes white, as transparency does."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.images import read_image
from ldm.masks import mask_of, read_mask


def object_alone(file: Path) -> Image.Image:
    """Read an image with white where the mask beside it is black; whole where it has none.

    Raises:
        UserError: the image or its mask cannot be read, or their sizes differ.
    """
    image, mask = read_image(file), mask_of(file)
    if mask is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), read_mask(mask, image, file))


def content_with_mask(file: Path) -> bytes:
    """Return the bytes of an image's file and, behind them, of its mask's: what `object_alone` makes depends on both."""
    mask = mask_of(file)
    return file.read_bytes() + (mask.read_bytes() if mask else b"")


def in_words(references: Sequence[Path], images: Sequence[Path]) -> str:
    """Return in words how many references and generated images were masked, and what was done with the others."""
    with_mask = [sum(mask_of(file) is not None for file in files) for files in (references, images)]
    whole = "" if with_mask == [len(references), len(images)] else "; the others count whole"
    return (
        f"CLIP-I and DINO-I see the object alone, on white, where a mask lies beside the image: {with_mask[0]} of "
        f"{len(references)} references, {with_mask[1]} of {len(images)} generated images{whole}. CLIP-T sees whole images."
    )
