"""Captioned images as users keep them: lists, or a text file beside each image."""

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
    return [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]


def _caption_beside(image: Path) -> str:
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise UserError(
            f"no caption {file}: put a text file with the caption beside each regularization image, "
            "or lists images.txt and caption.txt into the folder"
        )
    return " ".join(file.read_text(encoding="utf-8-sig", errors="replace").split())
