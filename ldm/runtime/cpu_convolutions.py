"""Weights in the layout that a CPU computes in.

oneDNN, which PyTorch convolves with on CPUs, works on blocks of channels. A plain weight is rearranged in
every call, forward and backward, which at a UNet's lowest resolutions takes longer than the convolution
itself. Here frozen weights are rearranged once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

LARGE = 2**20  # weights of a convolution from which on rearranging them in every call is felt


class MkldnnConv2d(nn.Module):
    """A frozen convolution on a CPU, whose weight is rearranged at the first call and then kept so.

    The gradient reaches its input. For that a second copy of the weight is made at the first backward.
    The best layout depends on the size of the features: images of another size than the first are
    convolved as correctly, only less fast.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: list[Any] = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]
        self.backward_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return _Convolution.apply(x, self) if x.requires_grad else self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """Return the convolution of x (b, c, h, w)."""
        if not self.weight.is_mkldnn:
            self.weight = nn.Parameter(_rearranged(self.weight.detach(), self.geometry, x), requires_grad=False)
        return _convolve(x, self.weight, self.bias, self.geometry)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient by the input, of a shape (b, c, h, w), from that by the output."""
        stride, padding, dilation, groups = self.geometry
        turned_padding = [side - 1 - p for side, p in zip(self.weight.shape[2:], padding, strict=True)]
        if [stride, dilation, groups] != [[1, 1], [1, 1], 1] or min(turned_padding) < 0:
            weight = self.weight.to_dense()
            return conv2d_input(shape, weight, gradient, stride, padding, dilation, groups)
        # Without strides it is a convolution too, with the kernel turned.
        geometry = [stride, turned_padding, dilation, groups]
        if self.backward_weight is None:
            turned = self.weight.to_dense().flip(2, 3).transpose(0, 1).contiguous()
            self.backward_weight = _rearranged(turned, geometry, gradient)
        return _convolve(gradient, self.backward_weight, None, geometry)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, conv: MkldnnConv2d) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape  # of the input no more is needed: the weight is frozen
        return conv.convolve(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.input_gradient(gradient, ctx.shape), None


def _rearranged(weight: Tensor, geometry: list, x: Tensor) -> Tensor:
    stride, padding, dilation, groups = geometry
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
    return reorder(weight.to_mkldnn(), padding, stride, dilation, groups, list(x.shape))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list) -> Tensor:
    # The operator of compiled graphs; torch.mkldnn_convolution would rearrange the weight again.
    stride, padding, dilation, groups = geometry
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")


def unpack(network: nn.Module) -> None:
    """Put plain weights back where they were packed, so that they can be read and written; the next call packs them anew."""
    for module in network.modules():
        if isinstance(module, MkldnnConv2d) and module.weight.is_mkldnn:
            module.weight = nn.Parameter(module.weight.detach().to_dense(), requires_grad=False)
            module.backward_weight = None


def to_mkldnn(network: nn.Module) -> int:
    """Give the large convolutions of a network on a CPU packed weights; from then on they are frozen.

    Returns:
        The number of these convolutions.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    large = [
        (module, name, child)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Conv2d) and child.weight.numel() >= LARGE
    ]
    for module, name, child in large:
        setattr(module, name, MkldnnConv2d(child))
    return len(large)
