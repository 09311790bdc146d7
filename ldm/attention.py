"""Attention: one free function does the arithmetic, modules only own weights."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What cross-attention calls with q (b, h, n, d), k and v (b, h, l, d); returns (b, h, n, d)."""


class KeysValues(NamedTuple):
    """What a cross-attention layer reads of a text."""

    keys: Tensor  # (b, h, l, d)
    values: Tensor  # (b, h, l, d)


Text = Tensor | list[KeysValues]
"""What cross-attention reads: a context (b, l, context_dim), or each layer's keys and values, worked out beforehand."""

T = TypeVar("T")


def of_layer(given: T | list[T], layer: int) -> T:
    """Return what a list holds for a cross-attention layer; what is no list is for all of them."""
    return given[layer] if isinstance(given, list) else given


def stacked(texts: list[list[KeysValues]]) -> list[KeysValues]:
    """Put the rows of several texts below each other, layer by layer."""
    return [KeysValues(*(torch.cat(parts) for parts in zip(*layer, strict=True))) for layer in zip(*texts, strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1).

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, l, d).
        v: values (b, h, l, d).

    Returns:
        (b, h, n, d).
    """
    return F.scaled_dot_product_attention(q, k, v)


def attention_maps(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), shape (b, h, n, l), from q (b, h, n, d) and k (b, h, l, d)."""
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x on a context, or on itself."""

    def __init__(
        self,
        dim: int,  # width of x
        context_dim: int | None,  # width of the context; None: self-attention
        heads: int,
        dim_head: int,
    ):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        # SD checkpoints call the projection "to_out.0"; index 1 was a dropout.
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None, attend: Attend = attend) -> Tensor:
        """x (b, n, dim), context (b, l, context_dim) or its keys and values -> (b, n, dim)."""
        k, v = context if isinstance(context, KeysValues) else self.keys_values(x if context is None else context)
        out = attend(self._heads(self.to_q(x)), k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def keys_values(self, context: Tensor, to_k: Tensor | None = None, to_v: Tensor | None = None) -> KeysValues:
        """Return the keys and values of a context (b, l, context_dim).

        Args:
            to_k, to_v: matrices (h d, context_dim) in place of the layer's own.
        """
        matrices = (self.to_k.weight if to_k is None else to_k, self.to_v.weight if to_v is None else to_v)
        return KeysValues(*(self._heads(F.linear(context, matrix)) for matrix in matrices))

    def _heads(self, y: Tensor) -> Tensor:
        return rearrange(y, "b n (h d) -> b h n d", h=self.heads)


class GEGLU(nn.Module):
    """Gated linear unit with GELU gate (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward; the names follow SD checkpoints (net.0.proj, net.2)."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention on the text, feed-forward; each residual and pre-normed."""

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int):
        super().__init__()
        self.layer = 0  # number of the cross-attention layer in the order they run; the UNet gives it
        self.attn1 = Attention(dim, None, heads, dim_head)
        self.attn2 = Attention(dim, context_dim, heads, dim_head)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Text, cross_attend: Attend | list[Attend]) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        context: Tensor | KeysValues = text if isinstance(text, Tensor) else text[self.layer]
        x = x + self.attn2(self.norm2(x), context, of_layer(cross_attend, self.layer))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between two projections."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, linear: bool = False):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.linear = linear  # SD 2.x projects the pixels' row, SD 1.x the map: the same numbers, other shapes
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads, channels // heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Text, cross_attend: Attend | list[Attend]) -> Tensor:
        """x (b, c, h, w) -> (b, c, h, w); text and cross_attend as `UNet.forward` has them."""
        height = x.shape[2]
        h = self.norm(x)
        h = self.proj_in(_rows(h)) if self.linear else _rows(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, text, cross_attend)
        return x + (_map(self.proj_out(h), height) if self.linear else self.proj_out(_map(h, height)))


def _rows(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def _map(x: Tensor, height: int) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=height)
