"""DBIM (Sec. 3.3) as two GPU kernels, equal to `dci.dual_branch.integration` to rounding.

The plain version writes both branches' attention maps to memory and reads them again and again. Here a
program holds the maps of some pixels in registers and writes one number for each pixel and branch; the
softmax over a layer's pixels needs all of them, so mixing the outputs is a second kernel. Nothing but
`dci.dual_branch.integration` imports this, and only for a GPU where Triton is installed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 64  # pixels of one program
CHANNELS = 32  # of queries and keys multiplied at a time


@triton.jit
def _evidence(
    q_ptr, k_ptr, counts_ptr, named_ptr, evidence_ptr, largest_ptr, sums_ptr,
    heads, pixels, tokens, counted, scale, token_sharpness, pixel_sharpness,
    q_batch, q_head, q_pixel, k_batch, k_head, k_token,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pixel sharpness * evidence of a block of pixels of a head, the largest, and the sum of exp(it - the largest).

    OTHERS: the evidence is that of all tokens but the named ones.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    n, j, d = block * PIXELS + tl.arange(0, PIXELS), tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    inside = n < pixels

    # Attention maps, softmax(q k^T / sqrt(d)), in fp32.
    logits = tl.zeros((PIXELS, TOKENS), tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        c = start + d
        q_at = q_ptr + batch * q_batch + head * q_head + n[:, None] * q_pixel + c[None, :]
        k_at = k_ptr + batch * k_batch + head * k_head + j[None, :] * k_token + c[:, None]
        q = tl.load(q_at, mask=inside[:, None] & (c[None, :] < WIDTH), other=0.0)
        k = tl.load(k_at, mask=(j[None, :] < tokens) & (c[:, None] < WIDTH), other=0.0)
        logits += tl.dot(q, k, input_precision="ieee")
    logits = tl.where(j[None, :] < tokens, logits * scale, float("-inf"))
    maps = tl.exp(logits - tl.max(logits, 1)[:, None])
    maps = maps / tl.sum(maps, 1)[:, None]

    # Shares of the tokens behind the start token, softmax over those that count.
    at = batch * counted + j - 1
    behind = (j >= 1) & (j <= counted)
    counts = tl.load(counts_ptr + at, mask=behind, other=0) != 0
    named = tl.load(named_ptr + at, mask=behind, other=0) != 0
    sharp = tl.where(counts[None, :], token_sharpness * maps, float("-inf"))
    shares = tl.exp(sharp - tl.max(sharp, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    share = tl.sum(tl.where(named[None, :], shares, 0.0), 1)
    if OTHERS:
        share = tl.sum(shares, 1) - share

    # The softmax over pixels: exp() overflows from 89 on, so the block's largest value is subtracted.
    evidence = tl.where(inside, pixel_sharpness * share, float("-inf"))
    largest = tl.max(evidence, 0)
    tl.store(evidence_ptr + row * pixels + n, evidence, mask=inside)
    tl.store(largest_ptr + row * tl.num_programs(0) + block, largest)
    tl.store(sums_ptr + row * tl.num_programs(0) + block, tl.sum(tl.exp(evidence - largest), 0))


@triton.jit
def _mix(
    out_ptr, auxiliary_ptr, evidence_c_ptr, evidence_a_ptr, largest_c_ptr, largest_a_ptr, total_c_ptr, total_a_ptr,
    heads, pixels, gain, agg_lambda,
    c_batch, c_head, c_pixel, a_batch, a_head, a_pixel,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """O_c <- w_c O_c + (1 - w_c) O_a in place, w_c = sigmoid(a~ - lambda b~)."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    n, d = block * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED)
    inside = n < pixels
    raised_c = tl.exp(tl.load(evidence_c_ptr + row * pixels + n, mask=inside, other=0.0) - tl.load(largest_c_ptr + row))
    raised_a = tl.exp(tl.load(evidence_a_ptr + row * pixels + n, mask=inside, other=0.0) - tl.load(largest_a_ptr + row))
    a = gain * (raised_c / tl.load(total_c_ptr + row))
    b = gain * (raised_a / tl.load(total_a_ptr + row))
    weight = (1 / (1 + tl.exp(agg_lambda * b - a)))[:, None]

    whole = inside[:, None] & (d[None, :] < WIDTH)
    at = out_ptr + batch * c_batch + head * c_head + n[:, None] * c_pixel + d[None, :]
    other = auxiliary_ptr + batch * a_batch + head * a_head + n[:, None] * a_pixel + d[None, :]
    own = tl.load(at, mask=whole, other=0.0).to(tl.float32)
    others = tl.load(other, mask=whole, other=0.0).to(tl.float32)
    mixed = weight * own + (1 - weight) * others
    tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=whole)


class Evidence(NamedTuple):
    """What the softmax over a layer's pixels needs of a branch: exp(values - largest) / total."""

    values: Tensor  # pixel sharpness * evidence (b, h, n)
    largest: Tensor  # over the pixels (b, h)
    total: Tensor  # of exp(values - largest) over the pixels (b, h)


def integrate(out: Tensor, q: Tensor, k: Tensor, masks, dual, concept: slice, auxiliary: slice) -> None:
    """Integrate the concept rows of attention's output with its auxiliary rows, in place.

    Args:
        out: attention's output (b, h, n, d) for all rows; last dimensions are dense, here as in q and k.
        q, k: its queries (b, h, n, d) and keys (b, h, l, d).
        masks, dual, concept, auxiliary: as in `dci.dual_branch.integration.integrating_attend`.
    """
    sharpness = dual.token_sharpness, dual.pixel_sharpness
    evidences = (
        evidence(q[concept], k[concept], masks.concept_counts, masks.concept, *sharpness, others=False),
        evidence(q[auxiliary], k[auxiliary], masks.auxiliary_counts, masks.auxiliary, *sharpness, others=True),
    )
    mix(out[concept], out[auxiliary], evidences, dual.gain, dual.agg_lambda)


def evidence(
    q: Tensor, k: Tensor, counts: Tensor, named: Tensor, token_sharpness: float, pixel_sharpness: float, others: bool
) -> Evidence:
    """Return a branch's evidence, ready for the softmax over pixels.

    Args:
        q, k: the branch's queries (b, h, n, d) and keys (b, h, l, d), their last dimension dense.
        counts, named: its masks of tokens behind the start token (b, L), see `dci.dual_branch.integration.TokenMasks`.
        others: take the evidence of everything but the named tokens.

    Returns:
        Pixel sharpness * evidence, its largest value, and the sum of exp(evidence - largest); all in fp32.
    """
    b, h, n, width = q.shape
    blocks = triton.cdiv(n, PIXELS)
    values = q.new_empty(b, h, n, dtype=torch.float32)
    largest, sums = q.new_empty(2, b, h, blocks, dtype=torch.float32)
    _evidence[(blocks, b * h)](
        q, k, counts.to(torch.int8).contiguous(), named.to(torch.int8).contiguous(), values, largest, sums,
        h, n, k.shape[2], counts.shape[1], width**-0.5, float(token_sharpness), float(pixel_sharpness),
        *q.stride()[:3], *k.stride()[:3],
        WIDTH=width, TOKENS=triton.next_power_of_2(k.shape[2]), OTHERS=others, PIXELS=PIXELS, CHANNELS=CHANNELS,
    )  # fmt: skip
    # Blocks are summed in a fixed order: the same image every time, which atomic additions would not give.
    whole = largest.amax(dim=-1)
    return Evidence(values, whole, (sums * torch.exp(largest - whole[..., None])).sum(dim=-1))


def mix(concept: Tensor, auxiliary: Tensor, evidences: tuple[Evidence, Evidence], gain: float, agg_lambda: float) -> None:
    """Integrate the concept rows' attention output with the auxiliary rows', in place.

    Args:
        concept, auxiliary: (b, h, n, d), their last dimension dense.
        evidences: of the two branches, from `evidence`.
    """
    b, h, n, width = concept.shape
    c, a = evidences
    _mix[(triton.cdiv(n, PIXELS), b * h)](
        concept, auxiliary, c.values, a.values, c.largest, a.largest, c.total, a.total, h, n,
        float(gain), float(agg_lambda),
        *concept.stride()[:3], *auxiliary.stride()[:3],
        WIDTH=width, PADDED=triton.next_power_of_2(width), PIXELS=PIXELS,
    )  # fmt: skip
