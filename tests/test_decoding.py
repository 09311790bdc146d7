"""Tiled and sliced decoding gives what decoding at once gives."""

import pytest
import torch

from ldm.decoding import decode


@torch.inference_mode()
@pytest.mark.parametrize("tile", [16, 40, 64, 100])
@pytest.mark.parametrize("shape", [(40, 24), (17, 33)])
def test_tiles_leave_no_seam(tiny_base, tile, shape):
    latents = torch.randn(2, 4, *shape) * torch.linspace(0.2, 2, shape[1])
    whole = tiny_base.decode(latents)
    assert (decode(tiny_base, latents, tile=tile) - whole).abs().max() < 1e-4


@torch.inference_mode()
def test_slices_and_large_tiles_change_nothing(tiny_base):
    latents = torch.randn(5, 4, 8, 8)
    whole = tiny_base.decode(latents)
    assert (decode(tiny_base, latents, batch=2) - whole).abs().max() < 1e-5
    assert torch.equal(decode(tiny_base, latents, tile=64), whole)


@torch.inference_mode()
def test_tiles_in_half_precision(tiny):
    latents = torch.randn(1, 4, 32, 32)
    whole = tiny.decode(latents)
    tiled = decode(tiny.to(torch.bfloat16), latents, tile=48)
    assert tiled.dtype == torch.float32
    assert (tiled - whole).abs().mean() < 2e-2
