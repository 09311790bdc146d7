"""Half precision where it holds the numbers, single where it does not."""

from torch import Tensor

_ENOUGH = 1e-3  # of a tensor's norm; fp16's own rounding is below half of it


def half(tensor: Tensor) -> Tensor:
    """Return a tensor in fp16, or in fp32 where fp16 would overflow or lose small numbers."""
    whole = tensor.detach().float().cpu()
    rounded = whole.half()
    lost = (rounded.float() - whole).norm()
    return rounded.contiguous() if lost <= _ENOUGH * whole.norm() else whole.contiguous()
