"""Pictures: files <-> tensors, and grids."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def read_picture(file: str | Path) -> Image.Image:
    """Read a picture as RGB: EXIF rotation applied, transparency flattened onto white.

    Raises:
        UserError: the file is not a picture, or a broken one; it is named.
    """
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                ground = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(ground, picture)
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is not a readable picture ({_reason(error)}): mend it or take it out of the folder"
        ) from error


def _reason(error: Exception) -> str:
    return "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]


def list_pictures(folder: str | Path) -> list[Path]:
    """Return the picture files of a folder in the order of their names.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds the pictures")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.name.startswith("."))
    if not files:
        raise UserError(f"no pictures in {folder}: expected files ending in {', '.join(EXTENSIONS)}")
    return files


def square(picture: Image.Image, size: int) -> Image.Image:
    """Cut the largest square from the middle and resize it to size x size pixels."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [-1, 1] -> b RGB pictures."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]


def grid(pictures: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Put pictures of one size into a grid, row by row; about square when `columns` is None."""
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def captioned_grid(pictures: list[Image.Image], captions: list[str], columns: int, scale: int = 1) -> Image.Image:
    """Put enlarged pictures of one size into a grid, each with its caption below."""
    width, height = (scale * side for side in pictures[0].size)
    cells = []
    for picture, caption in zip(pictures, captions, strict=True):
        cell = Image.new("RGB", (width, height + 14), "white")
        cell.paste(picture.resize((width, height), Image.Resampling.LANCZOS))
        ImageDraw.Draw(cell).text((2, height + 1), caption, fill="black", font_size=10)
        cells.append(cell)
    return grid(cells, columns, gap=4)
