"""Weights in the layout that a CPU computes in.

oneDNN, which PyTorch convolves with on CPUs, works on blocks of channels. A plain weight is rearranged in
every call, which at a UNet's lowest resolutions takes longer than the convolution itself. Here it is
rearranged once.
"""

import torch
from torch import Tensor, nn

LARGE = 2**20  # weights of a convolution from which on rearranging them in every call is felt


class PackedConv2d(nn.Module):
    """A convolution for inference on a CPU, whose weight is rearranged at the first call and then kept so.

    The best layout depends on the size of the features: pictures of another size than the first are
    convolved as correctly, only less fast.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        if not self.weight.is_mkldnn:
            packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                self.weight.detach().to_mkldnn(), padding, stride, dilation, groups, list(x.shape)
            )
            self.weight = nn.Parameter(packed, requires_grad=False)
        # The operator of compiled graphs; torch.mkldnn_convolution would rearrange the weight again.
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, padding, stride, dilation, groups, "none", [], ""
        )


def pack(network: nn.Module) -> int:
    """Give the large convolutions of a network on a CPU packed weights; from then on it is for inference as it is.

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
        setattr(module, name, PackedConv2d(child))
    return len(large)
