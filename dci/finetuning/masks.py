"""Where the loss counts: object masks, at the resolution of the latent."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.masks import as_mask, mask_of, read_mask


def object_mask(file: Path, image: Image.Image) -> Image.Image:
    """Return an image's mask, 8-bit grey and of its size: white is the object.

    Args:
        image: the file's image as `open_image` returns it. Its alpha is taken where no
            mask lies beside the file.

    Raises:
        UserError: there is no mask, it is none (see `ldm.masks`), or it has another size.
    """
    beside = mask_of(file)
    if beside is not None:
        return read_mask(beside, image, file)
    if image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255]):
        return as_mask(image.getchannel("A"), f"the alpha channel of {file}")
    raise UserError(
        f"no mask for {file}: put {file.stem}.mask.png beside it (white is the object), "
        "use an image with transparency, or set data.masked_loss=false"
    )


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
