"""Sums of gradients that do not depend on how a batch is shared out.

The parts of a batch are added up in fp64, over micro-batches and processes alike, and rounded once; or in fp32,
for half the memory, where the last digit may depend on the order.
So a step with the same micro-batches is the same on any number of processes, and Adam, which turns
small differences of small gradients into full steps, has nothing to magnify.
"""

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn


class ProcessesInStep(DDPStrategy):
    """Lightning's DDP without torch's gradient buckets: `GradientSum` adds the gradients up."""

    def configure_ddp(self) -> None:
        """Leave the module as it is; every process has loaded the same weights."""


class GradientSum:
    """Adds up the gradients of the parts of a step."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype = torch.float64):
        self.parameters, self.dtype = parameters, dtype
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def accumulate(self) -> None:
        """Add the gradients that a backward pass has left, and take them away."""
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                gradient = parameter.grad.to(self.dtype)
                total = self.sums[i]
                self.sums[i] = gradient if total is None else total.add_(gradient)
                parameter.grad = None

    def write_mean(self, parts: int) -> None:
        """Put the mean over all parts, of all processes, into the parameters, and begin anew.

        A parameter that no part of any process has used gets no gradient.
        """
        if dist.is_available() and dist.is_initialized():
            self._sum_over_processes()
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            parameter.grad = None if total is None else (total / parts).to(parameter.dtype)
        self.sums = [None] * len(self.parameters)

    def _sum_over_processes(self) -> None:
        """Two messages: which parameters were used by anyone, and the sums of those, in one row."""
        device = self.parameters[0].device
        used = torch.tensor([total is not None for total in self.sums], dtype=torch.int32, device=device)
        dist.all_reduce(used)
        taken = [i for i, number in enumerate(used.tolist()) if number]
        row = torch.cat([self._sum_or_zeros(i).flatten() for i in taken])
        dist.all_reduce(row)
        pieces = row.split([self.parameters[i].numel() for i in taken])
        for i, piece in zip(taken, pieces, strict=True):
            self.sums[i] = piece.view_as(self.parameters[i])

    def _sum_or_zeros(self, i: int) -> Tensor:
        total = self.sums[i]
        return torch.zeros_like(self.parameters[i], dtype=self.dtype) if total is None else total


def sum_over_processes(value: float, device: torch.device) -> float:
    """Return the sum of all processes' values."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def largest_over_processes(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
