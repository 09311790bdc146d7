"""Decoding large images and large batches in bounded memory: slices of the batch, tiles of the image.

How many images are decoded together follows from the memory that is left. Tiles decoded by themselves
would show: each would be normalised by its own statistics. So the tiles pass through one layer at a time,
with the statistics of the whole image, and nothing is blended. Whole feature maps wait in main memory;
the device holds a tile of one layer.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder import Decoder, ResnetBlock
from ldm.config import AutoencoderConfig
from ldm.diffusion import LatentDiffusion
from ldm.runtime.acceleration import is_emulated
from ldm.runtime.device_memory import free_memory

SHARE = 0.5  # of what the device has left, for decoding
MAPS = 5  # of the widest layer, that are held at once
SMALLEST = 4  # latent cells of a tile's side


def decode(model: LatentDiffusion, latents: Tensor, tile: int | None = None, batch: int | None = None) -> Tensor:
    """Scaled latents (b, c, h, w) -> images (b, 3, H, W) in [-1, 1].

    Args:
        tile: work on tile x tile pixels at a time; None, or a tile no smaller than the image: whole.
        batch: images at a time.

    Where neither is given, both follow from the memory that is left, with a warning if that is short.
    """
    f = model.config.autoencoder.downsampling
    height, width = (f * side for side in latents.shape[-2:])
    if tile is None and batch is None:
        batch, tile = within_memory(model, len(latents), height, width)
    if tile is not None and tile**2 < height * width:
        with model.vae_precision():
            return torch.cat([_tiled(model, one, tile**2) for one in latents.split(1)])
    return torch.cat([model.decode(part) for part in latents.split(batch or max(len(latents), 1))])


def within_memory(
    model: LatentDiffusion, images: int, height: int, width: int, free: int | None = None
) -> tuple[int, int | None]:
    """Return how many images to decode at a time, and the side of their tiles in pixels, None for whole ones.

    Args:
        free: bytes that the device has left; None: as it is now.
    """
    config, size = model.config.autoencoder, bytes_of(model.vae_dtype, model.device)
    budget = SHARE * (free_memory(model.device) if free is None else free)
    each = decoding_bytes(config, height, width, size)
    if images * each <= budget:
        return max(images, 1), None
    # Powers of two: the slices are of one size, and the same as long as about as much is left.
    batch, tile = 2 ** int(math.log2(max(budget / each, 1))), None
    # On a CPU tiles would save little: whole maps wait in the same memory.
    if each > budget and model.device.type != "cpu":
        widest = config.ch * max(config.ch_mult)
        tile = max(math.isqrt(int(budget / (MAPS * widest * size))), SMALLEST * config.downsampling)
    if tile or batch < images:
        how = f"tiles of {tile} px" if tile else f"{batch} of {images} images at a time"
        warnings.warn(
            f"decoding in {how}: all {images} of {width}x{height} px together would take about "
            f"{images * each / 2**30:.1f} GiB, too much for what is free on {model.device}; vae_batch= and "
            "vae_tile= decide otherwise",
            stacklevel=3,
        )
    return min(batch, images), tile


def bytes_of(dtype: torch.dtype, device: torch.device | str) -> int:
    """Return how many bytes a number takes while it is computed with: where a CPU emulates its format, an fp32 copy too."""
    return dtype.itemsize + (torch.float32.itemsize if is_emulated(dtype, device) else 0)


def decoding_bytes(config: AutoencoderConfig, height: int, width: int, size: int) -> int:
    """Estimate the memory that decoding one image takes above weights and result, from above.

    Args:
        size: bytes of a number.
    """
    # A level starts as wide as the one below it was; the outermost pixels count most.
    entering = [*config.ch_mult[1:], config.ch_mult[-1]]
    widest = max(config.ch * mult / 4**level for level, mult in enumerate(entering))
    return int(MAPS * widest * height * width * size)


def _tiled(model: LatentDiffusion, latents: Tensor, area: int) -> Tensor:
    """Decode one image, `area` pixels of a layer's map at a time."""
    hidden = model.autoencoder.to_hidden(latents.to(model.vae_dtype) / model.config.latent_scale)
    return _to_pixels(model.autoencoder.decoder, hidden.cpu().contiguous(), area).to(latents).clamp(-1, 1)


def _to_pixels(decoder: Decoder, h: Tensor, area: int) -> Tensor:
    """What `Decoder.to_pixels` does, in tiles."""
    levels: list[Any] = list(decoder.up)
    for level in reversed(levels):
        for block in level.block:
            h = _resnet_block(block, h, area)
        if hasattr(level, "upsample"):
            h = _convolve(level.upsample.conv, h, area, lambda x: x, scale=2)
    return _convolve(decoder.conv_out, h, area, _norm_silu(decoder.norm_out, h))


def _resnet_block(block: ResnetBlock, x: Tensor, area: int) -> Tensor:
    h = _convolve(block.conv1, x, area, _norm_silu(block.norm1, x))
    h = _convolve(block.conv2, h, area, _norm_silu(block.norm2, h))
    shortcut = getattr(block, "nin_shortcut", nn.Identity())
    for top, bottom in _bands(x, area):
        rows = x[..., top:bottom, :].to(block.conv1.weight.device)
        h[..., top:bottom, :] += shortcut(rows).to(h.device)
    return h


def _norm_silu(norm: nn.GroupNorm, whole: Tensor) -> Callable[[Tensor], Tensor]:
    """Return silu(norm(x)) for parts of a map, with the whole map's mean and variance."""
    groups = whole.view(len(whole), norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, -1, correction=0)
    per_channel = whole.shape[1] // norm.num_groups
    variance, mean = (value.repeat_interleave(per_channel, 1).to(norm.weight.device) for value in (variance, mean))
    factor = norm.weight * torch.rsqrt(variance + norm.eps)
    offset = norm.bias - mean * factor
    return lambda x: F.silu(x * factor[..., None, None].to(x) + offset[..., None, None].to(x))


def _convolve(conv: nn.Conv2d, x: Tensor, area: int, before: Callable[[Tensor], Tensor], scale: int = 1) -> Tensor:
    """Apply `before`, nearest upsampling and a 3x3 convolution to a map (1, c, h, w) in bands of rows.

    Each band is read with the rows next to it; zeros stand only beyond the image.
    """
    height, width = x.shape[-2:]
    out = x.new_empty(1, conv.out_channels, scale * height, scale * width)
    for top, bottom in _bands(x, area // scale**2):
        above, below = top > 0, bottom < height
        band = before(x[..., top - above : bottom + below, :].to(conv.weight.device))
        if scale > 1:
            band = F.interpolate(band, scale_factor=float(scale), mode="nearest")
            # One row of each neighbour is needed, scale rows came of it.
            spare = scale - 1
            band = band[..., spare * above : band.shape[-2] - spare * below, :]
        band = F.pad(band, (1, 1, int(not above), int(not below)))
        out[..., scale * top : scale * bottom, :] = F.conv2d(band, conv.weight, conv.bias).to(out.device)
    return out


def _bands(x: Tensor, area: int) -> list[tuple[int, int]]:
    """Split the rows of a map into bands of about `area` pixels."""
    height, width = x.shape[-2:]
    rows = max(area // width, 1)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]
