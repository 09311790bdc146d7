"""Attention: one free function does the arithmetic, modules only own weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What cross-attention calls with q (b, h, n, d), k and v (b, h, l, d); returns (b, h, n, d)."""


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

    def forward(self, x: Tensor, context: Tensor | None = None, attend: Attend = attend) -> Tensor:
        """x (b, n, dim), context (b, l, context_dim) -> (b, n, dim)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


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
        self.attn1 = Attention(dim, None, heads, dim_head)
        self.attn2 = Attention(dim, context_dim, heads, dim_head)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, cross_attend: Attend) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, cross_attend)
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

    def forward(self, x: Tensor, context: Tensor, cross_attend: Attend) -> Tensor:
        """x (b, c, h, w), context (b, l, context_dim) -> (b, c, h, w)."""
        height = x.shape[2]
        h = self.norm(x)
        h = self.proj_in(_rows(h)) if self.linear else _rows(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context, cross_attend)
        return x + (_map(self.proj_out(h), height) if self.linear else self.proj_out(_map(h, height)))


def _rows(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def _map(x: Tensor, height: int) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=height)
