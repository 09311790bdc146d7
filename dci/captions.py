"""Captioned images as users keep them: lists, or a text file beside each image."""

import codecs
import warnings
from pathlib import Path

from ldm.errors import UserError
from ldm.images import list_images
from ldm.shipped import find

_LISTS = (("images.txt", "caption.txt"), ("images.txt", "captions.txt"))
LISTS = ("images.txt", "caption.txt", "captions.txt")
"""Names of the files that such lists are in."""


def captioned_files(folder: str | Path) -> dict[Path, str]:
    """Return the images of a folder with their captions, from lists or from a `.txt` beside each.

    In lists, `images.txt` names an image in each line and `caption.txt` has its caption in the same line.

    Raises:
        UserError: a caption or a listed image is missing, or the lists differ in length.
    """
    folder = find(folder)
    for names, texts in _LISTS:
        if (folder / names).is_file() and (folder / texts).is_file():
            return _listed(folder, _lines(folder / names), _lines(folder / texts), texts)
    return {file: _caption_beside(file) for file in list_images(folder)}


def _listed(folder: Path, names: list[str], captions: list[str], texts: str) -> dict[Path, str]:
    if len(names) != len(captions):
        raise UserError(
            f"{folder}: images.txt has {len(names)} lines, {texts} has {len(captions)}: give one caption for each image"
        )
    if not names:
        raise UserError(f"{folder / 'images.txt'} names no images")
    return {_find(folder, name): caption for name, caption in zip(names, captions, strict=True)}


def _find(folder: Path, name: str) -> Path:
    """Find a listed image: lists made elsewhere name it from their own folder, or in full."""
    places = [folder / name, folder / "images" / Path(name).name, folder / Path(name).name, folder.parent / name, Path(name)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{folder / 'images.txt'} names {name}, which is not in {folder}: put it there or strike the line")
    return file


def _lines(file: Path) -> list[str]:
    # Not splitlines: a caption may hold characters that it would split at, such as U+2028.
    return [line.strip() for line in _text(file).split("\n") if line.strip()]


def _text(file: Path) -> str:
    """A text in UTF-8, or in UTF-16 as some editors write it; other bytes are replaced, with a warning."""
    content = file.read_bytes()
    try:
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        warnings.warn(
            f"{file} is not UTF-8 text (byte {error.start}): what cannot be read is \ufffd; save it as UTF-8", stacklevel=2
        )
        return content.decode("utf-8-sig", errors="replace")


def _caption_beside(image: Path) -> str:
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise UserError(
            f"no caption {file}: put a text file with the caption beside each regularization image, "
            "or lists images.txt and caption.txt into the folder"
        )
    return " ".join(_text(file).split())
