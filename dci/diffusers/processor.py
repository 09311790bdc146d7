"""The attention processor of diffusers' UNets that is handed DCI's integration, and where it is put."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attention import Attend, attend, of_layer
from ldm.errors import UserError


class Integration(NamedTuple):
    """What one call of the UNet hands to its cross-attention layers while both branches run."""

    attend: Attend | list[Attend]  # of all layers, or of each
    base: list[tuple[Tensor, Tensor]] | None = None  # each layer's W_base - W of keys and values; None: the same weights
    rows: int = 0  # how many of the last rows have the base's keys and values


class DCIAttnProcessor:
    """Attention as diffusers computes it; while `dci` is given, cross-attention integrates the branches.

    It holds nothing but its layer's number: weights stay in the layer, and what changes from call to call comes
    with the call, through `cross_attention_kwargs`.
    """

    def __init__(self, layer: int | None = None):
        self.layer = layer  # in the order the cross-attention layers run; None: self-attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        dci: Integration | None = None,
    ) -> Tensor:
        """hidden_states (b, n, dim), encoder_hidden_states (b, l, context_dim) -> (b, n, dim)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if dci is None or self.layer is None:
            function = attend
        else:
            function = of_layer(dci.attend, self.layer)
            if dci.base is not None:
                to_k, to_v = dci.base[self.layer]
                k, v = _with_base(k, context, to_k, dci.rows), _with_base(v, context, to_v, dci.rows)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = function(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _with_base(y: Tensor, context: Tensor, change: Tensor, rows: int) -> Tensor:
    """Return keys or values y (b, l, d) whose last rows are those of the base's weights.

    The change is added to what the layer computes, so that a LoRA on it, or its quantisation, counts in both branches.
    """
    return torch.cat([y[:-rows], y[-rows:] + F.linear(context[-rows:], change)])


_USUAL = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "XFormersAttnProcessor",
    "SlicedAttnProcessor",
    "FusedAttnProcessor2_0",
    "DCIAttnProcessor",
}
"""Processors that compute plain attention, so that ours may stand in for them."""

_UNUSUAL = ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k", "residual_connection")
"""What a layer of a Stable Diffusion UNet does not have, and our processor leaves out."""


def check_processors(unet: nn.Module) -> None:
    """Raise UserError for a UNet whose attention is not plain: an IP-Adapter's, or another program's."""
    for name, processor in unet.attn_processors.items():
        kind = type(processor).__name__
        if "IPAdapter" in kind:
            raise UserError(
                "an IP-Adapter is loaded, which owns the attention that DCI integrates: "
                "call unload_ip_adapter() first, or give dci=False to sample without DCI"
            )
        if kind not in _USUAL:
            raise UserError(
                f"the UNet's attention {name} is computed by {kind}, which DCI would displace: "
                "call unet.set_default_attn_processor() first, or give dci=False"
            )
        layer = unet.get_submodule(name.removesuffix(".processor"))
        odd = [what for what in _UNUSUAL if getattr(layer, what, None) not in (None, False)]
        if odd or getattr(layer, "rescale_output_factor", 1.0) != 1.0:
            raise UserError(f"the UNet's attention {name} has {', '.join(odd) or 'a factor'}: expected Stable Diffusion's")


@contextmanager
def processors(unet: nn.Module, layers: list[str]) -> Iterator[None]:
    """Within it a UNet has our attention processors; afterwards its own again.

    Args:
        layers: names of the cross-attention modules, in the order they run.
    """
    before = unet.attn_processors
    numbers = {f"{name}.processor": number for number, name in enumerate(layers)}
    unet.set_attn_processor({name: _processor(numbers.get(name)) for name in before})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@cache
def _processor(layer: int | None) -> DCIAttnProcessor:
    # Always the same objects: a compiled UNet is compiled again for others.
    return DCIAttnProcessor(layer)
