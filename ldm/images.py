"""Pictures: files <-> tensors, and grids."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNSUPPORTED = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".ppm", ".pgm", ".exr", ".hdr", ".svg", ".eps", ".psd", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".raw",
)  # fmt: skip
"""Pictures too, but of formats that are not read here."""

MASK_ENDINGS = (".mask", "_mask")  # of the stem of a mask's file; of one length


def read_picture(file: str | Path) -> Image.Image:
    """Read a picture as RGB: EXIF rotation applied, transparency flattened onto white.

    Raises:
        UserError: the file is not a picture, or a broken one; it is named.
    """
    return flatten(open_picture(file))


def open_picture(file: str | Path) -> Image.Image:
    """Read a picture as RGB, or as RGBA where it has transparency; EXIF rotation applied.

    Of an animation the first frame is taken; more than 8 bits per channel are rounded to 8.

    Raises:
        UserError: the file is not a picture, or a broken one; it is named.
    """
    if Path(file).suffix.lower() in UNSUPPORTED:
        raise UserError(f"{file} is not of a supported format ({', '.join(EXTENSIONS)}): convert it or take it out")
    try:
        with Image.open(file) as picture:
            picture.seek(0)
            picture = _eight_bits(ImageOps.exif_transpose(picture))
            return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is not a readable picture ({_reason(error)}): mend it or take it out of the folder"
        ) from error


def flatten(picture: Image.Image) -> Image.Image:
    """RGB or RGBA picture -> RGB, transparency onto white."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and floating-point grey to 8 bits, where convert() would cut off what is above 255."""
    if picture.mode == "F":
        values = np.asarray(picture)
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float64)
        values = values / 257 if values.max(initial=0) > 255 or ";16" in picture.mode else values
    else:
        return picture
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    return "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]


def list_pictures(folder: str | Path) -> list[Path]:
    """Return the picture files of a folder in the order of their names, those of unsupported formats included.

    Masks (`NAME.mask.png` or `NAME_mask.png` beside NAME) and files of other kinds are not pictures.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds the pictures")
    known = EXTENSIONS + UNSUPPORTED
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in known and not f.name.startswith("."))
    stems = {f.stem for f in files}
    files = [f for f in files if not (f.stem.endswith(MASK_ENDINGS) and f.stem[: -len(MASK_ENDINGS[0])] in stems)]
    if not files:
        raise UserError(f"no pictures in {folder}: expected files ending in {', '.join(EXTENSIONS)}")
    return files


def mask_of(picture: str | Path) -> Path | None:
    """Return the mask file beside a picture, if there is one."""
    picture = Path(picture)
    files = (picture.with_name(f"{picture.stem}{ending}.png") for ending in MASK_ENDINGS)
    return next((file for file in files if file.is_file()), None)


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
