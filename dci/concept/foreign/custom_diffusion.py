"""diffusers' Custom Diffusion: whole weights of attention processors, and a file for each token."""

import re

from torch import Tensor

from dci.concept.foreign.content import Content
from dci.concept.foreign.layers import UNET, Layers, layer_of
from ldm.errors import UserError

WEIGHTS = "pytorch_custom_diffusion_weights.bin"
_MARK = "_custom_diffusion."
_NAME = re.compile(r"(?P<block>.+\.attn2)\.processor\.(?P<layer>to_[kqv]|to_out)_custom_diffusion\.(?P<rest>.+)")


def is_custom_diffusion(content: dict) -> bool:
    """Whether a file's content is that of diffusers' Custom Diffusion."""
    return any(isinstance(name, str) and _MARK in name for name in content)


def read(content: dict, layers: Layers, source: str) -> Content:
    """Return the whole weights that a file sets.

    Raises:
        UserError: a name or a shape that the model does not have.
    """
    weights = {}
    for name, tensor in content.items():
        if isinstance(tensor, dict) and not tensor:
            continue  # diffusers' loader wants an entry for each self-attention layer
        match = _NAME.fullmatch(name)
        if not match or not isinstance(tensor, Tensor):
            raise UserError(f"{source} has '{name}', which is no weight of Custom Diffusion")
        rest = match["rest"]
        layer, kind = rest.rpartition(".")[::2]
        theirs = f"{match['block']}.{match['layer']}" + (f".{layer}" if layer else "")
        place = layers.unet.get(theirs)
        if place is None or kind not in ("weight", "bias"):
            raise UserError(f"{source} sets '{name}', which the model '{layers.config.name}' does not have")
        weights[place.weight if kind == "weight" else place.bias] = tensor
    return Content("diffusers' Custom Diffusion", weights=weights)


def write(weights: dict[str, Tensor], base: dict[str, Tensor], layers: Layers) -> tuple[dict, list[str]]:
    """Return a file's content, and the weights that it cannot carry.

    Args:
        weights: whole, by SD's names.
        base: the base model's, for keys and values that the concept leaves alone: the loader needs all of them.
    """
    theirs = {place.name: name for name, place in layers.unet.items()}
    needed = {name: weight for name, weight in base.items() if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))}
    carried = {name: weight for name, weight in weights.items() if name.startswith(UNET) and ".attn2." in name}
    for name in [name for name in carried if ".to_out." in name or ".to_q." in name]:
        # A processor has queries and output together, or neither.
        block = name.partition("attn2.")[0] + "attn2."
        needed |= {n: base[n] for n in (block + "to_q.weight", block + "to_out.0.weight", block + "to_out.0.bias")}
    content: dict = {}
    for name, weight in (needed | carried).items():
        block, _, layer = theirs[layer_of(name)].rpartition(".attn2.")
        layer, dot, index = layer.partition(".")
        kind = name.rpartition(".")[2]
        content[f"{block}.attn2.processor.{layer}_custom_diffusion.{index}{dot}{kind}"] = (
            weight.detach().float().cpu().clone()
        )
    blocks = {name.rpartition(".attn1.")[0] for name in theirs.values() if ".attn1." in name}
    content |= {f"{block}.attn1.processor": {} for block in sorted(blocks)}
    return content, [name for name in weights if name not in carried]
