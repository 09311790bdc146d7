"""Images: files <-> tensors, and grids."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ldm.errors import UserError
from ldm.image_files import EXTENSIONS, UNSUPPORTED, in_srgb, read_file
from ldm.masks import image_of, split_masks
from ldm.shipped import find
from ldm.texts import readable


def read_image(file: str | Path) -> Image.Image:
    """Read an image as RGB: EXIF rotation applied, transparency flattened onto white.

    Raises:
        UserError: the file is not an image, or a broken one; it is named.
    """
    return flatten(open_image(file))


def open_image(file: str | Path) -> Image.Image:
    """Read an image as RGB, or as RGBA where it has transparency: 8 bits per channel, sRGB, EXIF rotation applied.

    See `ldm.image_files` for what is read, and how.

    Raises:
        UserError: the file is not an image, a broken one, or one that shows nothing; it is named.
    """
    image = read_file(file, in_srgb)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        raise UserError(
            f"{file} is transparent throughout: nothing of it can be seen; take it out, or mend its alpha channel"
        )
    return image


def flatten(image: Image.Image) -> Image.Image:
    """Image of any mode -> RGB, transparency onto white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder in the order of their names, those of unsupported formats included.

    Masks beside them (see `ldm.masks`) and files of other kinds are not images.

    Raises:
        UserError: no such folder, or no images in it.
    """
    folder = find(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds the images")
    images, _ = split_masks(f for f in sorted(folder.iterdir()) if is_image(f))
    if not images:
        held = not_used(folder, [])
        raise UserError(
            f"no images in {folder}: expected files ending in {', '.join(EXTENSIONS)}{f'; it holds {held}' if held else ''}"
        )
    return images


def is_image(file: Path) -> bool:
    """Whether a file has an image's name, of an unsupported format too, and is not hidden; no folder, no pipe."""
    named = file.suffix.lower() in EXTENSIONS + UNSUPPORTED and not file.name.startswith(".")
    return named and (file.is_file() or not file.exists())


def not_used(folder: str | Path, used: Iterable[str | Path]) -> str:
    """Return what a folder holds besides the files that are used, in words; "" for nothing.

    Hidden files do not count.
    """
    folder, files_used = find(folder), [Path(file) for file in used]
    names = {f.name for f in files_used} | {f.relative_to(folder).parts[0] for f in files_used if folder in f.parents}
    rest = [f for f in sorted(folder.iterdir()) if f.name not in names and not f.name.startswith(".")]
    stems = {Path(name).stem for name in names}
    kinds = {"folder": [f for f in rest if f.is_dir()]}
    files = [f for f in rest if not f.is_dir()]
    kinds["caption"] = [f for f in files if f.suffix.lower() in (".txt", ".caption") and f.stem in stems]
    kinds["mask"] = [f for f in files if is_image(f) and image_of(f) is not None]
    kinds["other file"] = [f for f in files if f not in kinds["caption"] + kinds["mask"]]
    return ", ".join(_counted(kind, found) for kind, found in kinds.items() if found)


def report_not_used(folder: str | Path, used: Iterable[str | Path], report: Callable[[str], None]) -> None:
    """Report in one line what a folder holds besides the files that are used, if anything."""
    if rest := not_used(folder, used):
        report(f"Not used in {folder}: {rest}")


def _counted(kind: str, files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files)} {kind}{'s' if len(files) > 1 else ''} ({names})"


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest square from the middle and resize it to size x size pixels."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [-1, 1] -> b RGB images."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]


def grid(images: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Put images of one size into a grid, row by row; about square when `columns` is None."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int, scale: int = 1) -> Image.Image:
    """Put enlarged images of one size into a grid, each with its caption below."""
    width, height = (scale * side for side in images[0].size)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        cell = Image.new("RGB", (width, height + 14), "white")
        cell.paste(image.resize((width, height), Image.Resampling.LANCZOS))
        ImageDraw.Draw(cell).text((2, height + 1), readable(caption), fill="black", font_size=10)
        cells.append(cell)
    return grid(cells, columns, gap=4)
