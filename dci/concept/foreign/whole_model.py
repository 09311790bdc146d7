"""Whole models: one with the concept inside, as a single file or a diffusers folder; and one tuned elsewhere."""

import torch
from torch import Tensor

from dci.concept.foreign.content import Content
from ldm.checkpoint import EMA
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

_UNET_CONV = "model.diffusion_model.input_blocks.0.0.weight"
TABLE = "token_embedding.weight"
WEIGHTS = ("all", "cross-attention")
"""What a tuned model's difference may be taken of."""


def is_whole_model(state: dict) -> bool:
    """Whether tensors are a whole model's, by SD's names."""
    return _UNET_CONV in state


def read(state: dict[str, Tensor], base: LatentDiffusion | None, which: str, source: str) -> Content:
    """Return the weights of a tuned model that differ from its base's.

    A weight in a coarser precision than the base's is compared in its own, so that a model saved in fp16 differs
    from its base in fp32 only where it was tuned.

    Args:
        which: "all", or "cross-attention".

    Raises:
        UserError: no base, a model of another architecture, or one that does not differ.
    """
    if base is None:
        raise UserError(f"{source} is a whole model: give the base model that it was tuned from as model=")
    own = base.state_dict()
    weights: dict[str, Tensor] = {}
    rows: tuple[Tensor, ...] = ()
    missing = [name for name in own if name not in state]
    if missing:
        raise UserError(f"{source} lacks {missing[0]} of the base model '{base.config.name}': give its own base as model=")
    for name, before in own.items():
        tensor = state[name]
        if name.endswith(TABLE) and tensor.ndim == 2 and len(tensor) > len(before):
            tensor, rows = tensor[: len(before)], (tensor[len(before) :].clone(),)
        if tensor.shape != before.shape:
            shapes = f"{tuple(tensor.shape)}, in the base model {tuple(before.shape)}"
            raise UserError(f"{source}: {name} is {shapes}: give its own base as model=")
        if (which == "all" or ".attn2." in name) and not torch.equal(tensor, before.to(tensor.dtype)):
            weights[name] = tensor.clone()
    if not weights and not rows:
        raise UserError(f"{source} does not differ from the base model '{base.config.name}': nothing to import")
    left = sum(name.startswith(EMA) for name in state)
    said = [f"{len(weights)} of {len(own)} weights differ from the base model's"]
    said += ["its averaged weights (model_ema.*) are left out"] if left else []
    return Content("a model tuned as a whole", weights=weights, tokens=rows, said=tuple(said))


def state_of(weights: dict[str, Tensor], model: LatentDiffusion) -> dict[str, Tensor]:
    """Return the base model's state dict with the concept's weights in it, in fp16.

    Raises:
        UserError: a weight is too large for fp16.
    """
    merged = {
        name: weights.get(name, tensor).detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()
    }
    wrong = next((name for name, tensor in merged.items() if not tensor.isfinite().all()), None)
    if wrong:
        raise UserError(f"{wrong} of the concept is too large for fp16: a checkpoint of it cannot be written")
    return merged
