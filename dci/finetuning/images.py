"""Images and captions as users keep them: folders, lists, masks, and files that cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dci.captions import LISTS, captioned_files
from dci.finetuning.config import DataConfig
from dci.finetuning.masks import object_mask
from dci.samples.reader import RECORD, read_samples, report_content
from ldm.buckets import cut, nearest_bucket, size_condition
from ldm.conditioning import ImageSize
from ldm.errors import UserError
from ldm.images import flatten, list_images, open_image, report_not_used, to_tensor
from ldm.masks import masks_of


@dataclass(frozen=True)
class TrainingImage:
    """An image as training takes it, its mask if it counts, and its caption if it has one."""

    file: Path
    pixels: Tensor  # (3, h, w) in [-1, 1]
    mask: Tensor | None = None  # (1, h, w) in [0, 1]
    caption: str = ""
    size: ImageSize | None = None  # the size that a model is conditioned on; None: its own


def read_references(
    folder: str | Path, config: DataConfig, size: int, report: Callable[[str], None] = print, multiple: int = 8
) -> list[TrainingImage]:
    """Read the images of a concept.

    Args:
        size: side of the squares in pixels.
        multiple: with `crop=bucket`, what the sides must be multiples of.
        report: called with a line on what is left out.

    Raises:
        UserError: the folder is missing or empty, or a file cannot be used and `on_bad_image` is error.
    """
    files = list_images(folder)
    masks = masks_of(files)
    if masks and not config.masked_loss:
        report(f"Masks in {folder} are not used: data.masked_loss=true counts the object alone")
    report_not_used(folder, [*files, *masks], report)

    def read(file: Path) -> TrainingImage:
        image = open_image(file)
        shape = _shape(image, config, size, multiple)
        mask = _mask_tensor(file, cut(object_mask(file, image), *shape)) if config.masked_loss else None
        return TrainingImage(file, to_tensor(cut(flatten(image), *shape)), mask, size=size_condition(image, *shape))

    return _read_all(files, read, folder, config.on_bad_image, report)


def read_regularization(
    folder: str | Path,
    config: DataConfig,
    size: int,
    report: Callable[[str], None] = print,
    most: int | None = None,
    multiple: int = 8,
) -> list[TrainingImage]:
    """Read captioned images of the class.

    The captions are in lists (`images.txt` names an image in each line, `caption.txt` has its
    caption in the same line), in a `.txt` beside each image, or in the `prompts.json` of sampled ones.

    Args:
        most: only so many, the first ones; None: all.

    Raises:
        UserError: the folder is missing or empty, a caption is missing, or a file cannot be used
            and `on_bad_image` is error.
    """
    captions = captions_of(folder)

    def read(file: Path) -> TrainingImage:
        image = open_image(file)
        shape = _shape(image, config, size, multiple)
        pixels = to_tensor(cut(flatten(image), *shape))
        return TrainingImage(file, pixels, caption=captions[file], size=size_condition(image, *shape))

    if (Path(folder) / RECORD).is_file():
        report_content(folder, captions, report)
    else:
        report_not_used(folder, [*captions, *(file.with_suffix(".txt") for file in captions), *LISTS], report)
    return _read_all(list(captions)[:most], read, folder, config.on_bad_image, report)


def _shape(image: Image.Image, config: DataConfig, size: int, multiple: int) -> tuple[int, int]:
    """Height and width that an image is cut to."""
    square = config.crop == "square"
    return (size, size) if square else nearest_bucket(image.height, image.width, size, multiple)


def captions_of(folder: str | Path) -> dict[Path, str]:
    """Return the images of a folder with their captions: a user's, or one that sampling wrote.

    Raises:
        UserError: there is none of them, or one without a caption.
    """
    if (Path(folder) / RECORD).is_file():
        return {sample.file: sample.prompt for sample in read_samples(folder)}
    return captioned_files(folder)


def _read_all(files: list[Path], read: Callable, folder: str | Path, on_bad: str, report: Callable) -> list[TrainingImage]:
    images = []
    for file in files:
        try:
            images.append(read(file))
        except UserError as error:
            if on_bad != "skip":
                raise
            report(f"Left out: {error}")
    if not images:
        raise UserError(f"no usable images in {folder}: all {len(files)} were left out")
    return images


def _mask_tensor(file: Path, mask: Image.Image) -> Tensor:
    if mask.getextrema()[1] == 0:
        raise UserError(f"the object of {file} lies outside the middle part, which alone is used: cut image and mask")
    return torch.from_numpy(np.array(mask)).float()[None] / 255
