"""Images that a visitor drops to learn from: checked, kept together, and shown as training will see them."""

import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from dci.app import markup
from dci.files import make_new_folder
from dci.finetuning.config import DataConfig
from dci.finetuning.images import read_references
from ldm.errors import UserError
from ldm.image_files import read_file, size_of
from ldm.images import list_images, to_images
from ldm.masks import masks_of

LEAST, MOST = 3, 20
MOST_PIXELS = 2**26  # of an image; a few kilobytes can claim billions
_SETS = 16  # that are kept for pages that have not started a training yet


@dataclass(frozen=True)
class ReferenceSet:
    """A folder of images, and the squares that training will see."""

    folder: Path
    names: list[str]
    squares: list[Image.Image]
    masks: list[Image.Image | None]
    said: list[str]  # what is left out

    def show(self) -> str:
        """Return the squares as HTML, each with its mask beside it where masks count."""
        cells = []
        for name, square, mask in zip(self.names, self.squares, self.masks, strict=True):
            beside = "" if mask is None else markup.figure(mask, f"Mask of {name}")
            cells.append(f'<div class="dci-square">{markup.figure(square, f"{name}, squared", caption=name)}{beside}</div>')
        number = f"{len(self.squares)} images, as training will see them."
        return markup.note(" ".join([number, *self.said])) + f'<div class="dci-squares">{"".join(cells)}</div>'


def collect(files: Sequence[str | Path], size: int, masked: bool, scratch: Path) -> ReferenceSet:
    """Copy uploaded images into a folder of their own and read them as training does.

    Args:
        size: side of the squares in pixels.
        masked: count the object alone: by NAME.mask.png beside NAME, or by an image's transparency.
        scratch: where the folder is made.

    Raises:
        UserError: too few or too many images, one that is none, or a mask that is missing.
    """
    folder = scratch / "sets" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    try:
        for file in map(Path, files):
            target = folder / plain_name(file.name)
            if target.exists():
                raise UserError(f"two images are called {target.name}: rename one of them")
            shutil.copyfile(file, target)
        for file in folder.iterdir():
            _check_pixels(file)
        images = list_images(folder)
        number = len(images)
        if not LEAST <= number <= MOST:
            raise UserError(f"{number} image{'s' if number != 1 else ''}: expected {LEAST} to {MOST} of one thing")
        said: list[str] = []
        pictures = read_references(folder, DataConfig(images=str(folder), masked_loss=masked), size, said.append)
    except UserError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(str(error).replace(f"{folder}/", "").replace(str(folder), "the upload")) from error
    _prune(folder.parent)
    squares = [to_images(picture.pixels[None])[0] for picture in pictures]
    masks = [None if p.mask is None else Image.fromarray((255 * p.mask[0]).byte().numpy()) for p in pictures]
    unused = ["Masks are not used: tick the box to count the object alone."] if masks_of(images) and not masked else []
    return ReferenceSet(folder, [picture.file.name for picture in pictures], squares, masks, unused)


def keep(folder: Path, logdir: Path, name: str) -> Path:
    """Copy a set to where it stays, for the run that learns from it, and for going on with that; return the folder."""
    target = make_new_folder(logdir / "references", f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{name}")
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, target / file.name)
    return target


def plain_name(name: str) -> str:
    """Return a file's name that is safe in any folder: its last part, of letters, digits, hyphens, dots and underscores."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^\w.-]+", "-", last).lstrip(".-")[-80:] or "image"


def _check_pixels(file: Path) -> None:
    """Raise UserError for a file that is no image, or one that is too large to be opened here."""
    read_file(file, lambda decoded: None) if _claimed(file) <= MOST_PIXELS else _refuse(file)


def _claimed(file: Path) -> int:
    try:
        width, height = size_of(file)
        return width * height
    except Image.DecompressionBombError:
        return MOST_PIXELS + 1
    except Exception:  # what cannot be opened here, the reader that opens it next refuses in its words
        return 0


def _refuse(file: Path) -> None:
    raise UserError(f"{file.name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller")


def _prune(folder: Path) -> None:
    """Forget the oldest sets."""
    sets = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in sets[:-_SETS]:
        shutil.rmtree(old, ignore_errors=True)
