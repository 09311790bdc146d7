"""Pictures and captions as users keep them: folders, lists, masks, and files that cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dci.config import DataConfig
from dci.masks import object_mask
from ldm.errors import UserError
from ldm.images import flatten, list_pictures, mask_of, open_picture, square, to_tensor

_LISTS = (("images.txt", "caption.txt"), ("images.txt", "captions.txt"))


@dataclass(frozen=True)
class Picture:
    """A square picture, its mask if it counts, and its caption if it has one."""

    file: Path
    pixels: Tensor  # (3, s, s) in [-1, 1]
    mask: Tensor | None = None  # (1, s, s) in [0, 1]
    caption: str = ""


def read_references(folder: str | Path, config: DataConfig, size: int, say: Callable[[str], None] = print) -> list[Picture]:
    """Read the pictures of a concept.

    Args:
        size: side of the squares in pixels.
        say: told what is left out.

    Raises:
        UserError: the folder is missing or empty, or a file cannot be used and `on_bad_image` is error.
    """
    files = list_pictures(folder)
    if not config.masked_loss and any(mask_of(file) for file in files):
        say(f"Masks in {folder} are not used: data.masked_loss=true counts the object alone")

    def read(file: Path) -> Picture:
        picture = open_picture(file)
        mask = _mask_tensor(file, square(object_mask(file, picture), size)) if config.masked_loss else None
        return Picture(file, to_tensor(square(flatten(picture), size)), mask)

    return _read_all(files, read, folder, config.on_bad_image, say)


def read_regularization(
    folder: str | Path, config: DataConfig, size: int, say: Callable[[str], None] = print, most: int | None = None
) -> list[Picture]:
    """Read captioned pictures of the class.

    The captions are in lists (`images.txt` names a picture in each line, `caption.txt` has its
    caption in the same line) or in a `.txt` beside each picture.

    Args:
        most: only so many, the first ones; None: all.

    Raises:
        UserError: the folder is missing or empty, a caption is missing, or a file cannot be used
            and `on_bad_image` is error.
    """
    captions = captioned_files(folder)

    def read(file: Path) -> Picture:
        return Picture(file, to_tensor(square(flatten(open_picture(file)), size)), caption=captions[file])

    return _read_all(list(captions)[:most], read, folder, config.on_bad_image, say)


def captioned_files(folder: str | Path) -> dict[Path, str]:
    """Return the pictures of a regularization folder with their captions; see `read_regularization`."""
    folder = Path(folder)
    for names, texts in _LISTS:
        if (folder / names).is_file() and (folder / texts).is_file():
            return _listed(folder, _lines(folder / names), _lines(folder / texts), texts)
    return {file: _caption_beside(file) for file in list_pictures(folder)}


def _listed(folder: Path, names: list[str], captions: list[str], texts: str) -> dict[Path, str]:
    if len(names) != len(captions):
        raise UserError(f"{folder}: images.txt has {len(names)} lines, {texts} has {len(captions)}: "
                        "give one caption for each picture")  # fmt: skip
    if not names:
        raise UserError(f"{folder / 'images.txt'} names no pictures")
    return {_find(folder, name): caption for name, caption in zip(names, captions, strict=True)}


def _find(folder: Path, name: str) -> Path:
    """Find a listed picture: lists made elsewhere name it from their own folder, or in full."""
    places = [folder / name, folder / "images" / Path(name).name, folder / Path(name).name, folder.parent / name, Path(name)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{folder / 'images.txt'} names {name}, which is not in {folder}: put it there or strike the line")
    return file


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]


def _caption_beside(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"no caption {file}: put a text file with the caption beside each regularization picture, "
                        "or lists images.txt and caption.txt into the folder")  # fmt: skip
    return " ".join(file.read_text(encoding="utf-8-sig", errors="replace").split())


def _read_all(files: list[Path], read: Callable, folder: str | Path, on_bad: str, say: Callable) -> list[Picture]:
    pictures = []
    for file in files:
        try:
            pictures.append(read(file))
        except UserError as error:
            if on_bad != "skip":
                raise
            say(f"Left out: {error}")
    if not pictures:
        raise UserError(f"no usable pictures in {folder}: all {len(files)} were left out")
    return pictures


def _mask_tensor(file: Path, mask: Image.Image) -> Tensor:
    if mask.getextrema()[1] == 0:
        raise UserError(f"the object of {file} lies outside the middle square, which alone is used: cut picture and mask")
    return torch.from_numpy(np.array(mask)).float()[None] / 255
