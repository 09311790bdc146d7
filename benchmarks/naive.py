"""The published arithmetic, for comparison only: every attention map is computed and kept, in every layer."""

import copy

import torch
from einops import rearrange
from torch import Tensor, nn

from dci.dual_branch.integration import DualBranch, TokenMasks
from ldm.attention import Attend, Attention
from ldm.unet import UNet


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its definition; shapes as `ldm.attention.attend`."""
    scores = torch.einsum("bhnd,bhld->bhnl", q, k) * q.shape[-1] ** -0.5
    maps = scores.softmax(dim=-1)
    return torch.einsum("bhnl,bhld->bhnd", maps, v)


class NaiveAttention(nn.Module):
    """Another module's attention, with its weights, by the definition."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v, self.to_out = attention.to_q, attention.to_k, attention.to_v, attention.to_out

    def forward(self, x: Tensor, context: Tensor | None = None, cross_attend: Attend = attend) -> Tensor:
        """As `ldm.attention.Attention`; the arithmetic that the UNet was given is not asked for."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


def naive_unet(unet: UNet) -> UNet:
    """Return a UNet that shares a UNet's weights and attends by the definition in all its layers."""
    copied = copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, Attention):
                setattr(module, name, NaiveAttention(child))
    return copied


def integrate(
    q: Tensor, k: Tensor, v: Tensor, masks: TokenMasks, dual: DualBranch, concept: slice, auxiliary: slice
) -> Tensor:
    """DBIM (Sec. 3.3) as its equations stand, over the maps of all rows; one prompt in all of them.

    Returns:
        (b, h, n, d): attention's output, the concept rows' integrated with the auxiliary rows'.
    """
    maps = (torch.einsum("bhnd,bhld->bhnl", q.float(), k.float()) * q.shape[-1] ** -0.5).softmax(dim=-1)
    out = torch.einsum("bhnl,bhld->bhnd", maps.to(v.dtype), v)
    m_c, m_a = masks.concept[0], masks.auxiliary[0]
    a = (dual.token_sharpness * maps[concept, :, :, 1 : 1 + len(m_c)]).softmax(dim=-1)[..., m_c].sum(dim=-1)
    b = (dual.token_sharpness * maps[auxiliary, :, :, 1 : 1 + len(m_a)]).softmax(dim=-1)[..., ~m_a].sum(dim=-1)
    a, b = (dual.gain * (dual.pixel_sharpness * evidence).softmax(dim=-1) for evidence in (a, b))
    w_c, w_a = torch.stack([a, dual.agg_lambda * b]).softmax(dim=0)[..., None].to(out.dtype)
    out = out.clone()
    out[concept] = w_c * out[concept] + w_a * out[auxiliary]
    return out
