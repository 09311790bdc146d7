"""Whole differences W - W_base by kohya's names (LyCORIS calls them "full"): `.diff` of weights, `.diff_b` of biases."""

from torch import Tensor

from dci.concept.foreign.half import half
from dci.concept.foreign.layers import Layers, layer_of


def write(differences: dict[str, Tensor], layers: Layers) -> tuple[dict[str, Tensor], list[str]]:
    """Return a file's tensors by kohya's names, and the weights that it cannot carry.

    Args:
        differences: of weights and biases, by SD's names.
    """
    tensors, left = {}, []
    for name, difference in differences.items():
        layer = layer_of(name)
        # The programs look for differences in layers alone, and a token table is none.
        if layer not in layers.kohya_of or "embedding" in layer:
            left.append(name)
            continue
        ending = ".diff_b" if name.endswith("bias") else ".diff"
        for kohya, place in layers.kohya_of[layer]:
            tensors[kohya + ending] = half(difference.chunk(place.part[1])[place.part[0]])
    return tensors, left
