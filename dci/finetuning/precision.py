"""Number formats of training: what is trained stays fp32, the frozen rest is kept in the format of the arithmetic."""

from typing import Literal

import torch
from torch import nn

from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.runtime.acceleration import warn_of_emulation

LightningName = Literal["32-true", "bf16-mixed", "16-mixed"]
LIGHTNING: dict[str, LightningName] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Our names, and Lightning's, which are understood too."""

_DTYPES: dict[LightningName, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def lightning_name(precision: str) -> LightningName:
    """Return Lightning's name of a precision.

    Raises:
        UserError: there is no such precision.
    """
    for ours, name in LIGHTNING.items():
        if precision in (ours, name):
            return name
    known = ", ".join([*LIGHTNING, *LIGHTNING.values()])
    raise UserError(f"training.precision={precision}: expected one of {known}")


def check_device(precision: str, device: torch.device) -> None:
    """Raise UserError for a precision that a device cannot train in, and warn of one that it emulates."""
    if lightning_name(precision) == "16-mixed" and device.type != "cuda":
        raise UserError(f"training.precision={precision} needs a GPU: give bf16, or train on cuda")
    warn_of_emulation(_DTYPES[lightning_name(precision)], device)


def cast_frozen_weights(model: LatentDiffusion, precision: str) -> None:
    """Keep the frozen weights of linear and convolution layers in the format they are computed in.

    Casting them once spares the cast in every step, and half the memory. Norms and embeddings are
    small and stay in fp32, and so does an autoencoder that overflows in fp16.
    """
    dtype = _DTYPES[lightning_name(precision)]
    spared = set(model.autoencoder.modules()) if model.config.autoencoder.force_upcast else set()
    for module in model.modules():
        if module not in spared and isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
