"""Where the loss counts: object masks, at the resolution of the latent."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import UserError
from ldm.images import mask_of, open_picture


def object_mask(file: Path, picture: Image.Image) -> Image.Image:
    """Return a picture's mask, 8-bit grey and of its size: white is the object.

    Args:
        picture: the file's picture as `open_picture` returns it. Its alpha is taken where no
            mask lies beside the file.

    Raises:
        UserError: there is no mask, it is empty, or it has another size.
    """
    beside = mask_of(file)
    if beside is not None:
        mask = _fit_rotation(open_picture(beside), file, picture)
        # A mask drawn on a transparent ground says in its alpha what it leaves out.
        mask = mask.getchannel("A") if mask.mode == "RGBA" else mask.convert("L")
        if mask.size != picture.size:
            raise UserError(f"{beside} is {mask.size[0]} x {mask.size[1]} px, its picture {file.name} "
                            f"{picture.size[0]} x {picture.size[1]}: give a mask of the picture's size")  # fmt: skip
    elif picture.mode == "RGBA":
        mask = picture.getchannel("A")
    else:
        raise UserError(f"no mask for {file}: put {file.stem}.mask.png beside it (white is the object), "
                        "use a picture with transparency, or set data.masked_loss=false")  # fmt: skip
    if mask.getextrema()[1] == 0:
        raise UserError(f"the mask of {file} is empty: white (or opaque) must be the object")
    return mask


def _fit_rotation(mask: Image.Image, file: Path, picture: Image.Image) -> Image.Image:
    """Turn a mask as its picture was turned, where it was drawn before the turn."""
    if mask.size == picture.size:
        return mask
    with Image.open(file) as raw:
        orientation = raw.getexif().get(0x0112, 1)
        if raw.size != mask.size or orientation == 1:
            return mask
    mask.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(mask)


def latent_weights(mask: Tensor, downsampling: int, background: float) -> Tensor:
    """Share of the object in each latent cell, from `background` (none) to 1 (all).

    Args:
        mask: (1, H, W) in [0, 1].
        downsampling: pixels per latent cell along one axis.

    Returns:
        (1, H / downsampling, W / downsampling).
    """
    return background + (1 - background) * F.avg_pool2d(mask, downsampling)


def masked_mse(output: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of each row where its weights are, averaged over the rows.

    Every row counts the same however small its object is (Custom Diffusion's valid-region loss).

    Args:
        output, target: (b, c, h, w).
        weights: (b, 1, h, w), not negative; None counts every cell.
    """
    error = (output - target).square()
    if weights is None:
        return error.mean()
    rows = (error * weights).sum(dim=(1, 2, 3)) / (error.shape[1] * weights.sum(dim=(1, 2, 3))).clamp(min=1e-6)
    return torch.mean(rows)
