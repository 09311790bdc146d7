"""Custom Diffusion's own files: `delta.ckpt` by SD's names and `delta.bin` by diffusers', whole or compressed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dci.concept.concept_file import LowRank
from dci.concept.foreign.content import Content
from dci.concept.foreign.layers import UNET, Layers, layer_of
from ldm.errors import UserError
from ldm.formats.diffusers_export import text_encoders
from ldm.formats.diffusers_names import text_names

EMBED = "embed"


def is_delta_ckpt(content: dict) -> bool:
    """Whether a file's content is a delta by SD's names; of a whole model it has cross-attention weights alone."""
    state = content.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        return False
    names = [name for name in state if isinstance(name, str)]
    return len(names) == len(state) and all(name == EMBED or (name.startswith(UNET) and ".attn2." in name) for name in names)


def is_delta_bin(content: dict) -> bool:
    """Whether a file's content is a delta by diffusers' names."""
    return isinstance(content.get("modifier_token"), Mapping) or (
        isinstance(content.get("unet"), Mapping) and not any(isinstance(value, Tensor) for value in content.values())
    )


def read_ckpt(content: dict, source: str) -> Content:
    """Return what a delta.ckpt holds: whole weights, or compressed ones as changes of low rank.

    Raises:
        UserError: something in it is no weight.
    """
    state = dict(content["state_dict"])
    embed = state.pop(EMBED, None)
    tokens = () if embed is None else (_rows(embed, source),)
    return _weights(state, source, lambda name: name, "delta.ckpt").with_(tokens=tokens)


def read_bin(content: dict, layers: Layers, source: str) -> Content:
    """Return what a delta.bin holds; see `read_ckpt`.

    Raises:
        UserError: it is damaged, or sets a weight that the model does not have.
    """

    def rename(name: str) -> str:
        layer, dot, kind = name.rpartition(".")
        if layer not in layers.unet:
            raise UserError(f"{source} sets '{name}', which the model '{layers.config.name}' does not have")
        return layers.unet[layer].name + dot + kind

    unet, tokens = content.get("unet") or {}, content.get("modifier_token") or {}
    if not isinstance(unet, Mapping) or not isinstance(tokens, Mapping):
        raise UserError(f"{source} is a damaged delta.bin: expected weights in 'unet' and embeddings in 'modifier_token'")
    found = _weights(dict(unet), source, rename, "delta.bin")
    rows = torch.stack([_rows(row, source)[0] for row in tokens.values()]) if tokens else None
    for part, prefix, encoder in text_encoders(layers.config):
        text = content.get(part)
        if isinstance(text, Mapping):
            state = {n: weight for n, weight in text.items() if isinstance(weight, Tensor) and "position_ids" not in n}
            named = text_names(state, encoder, prefix)
            # The tokens' own rows stand behind the vocabulary, and in 'modifier_token' too.
            found.weights.update({n: w[: encoder.vocab_size] if "token_embedding" in n else w for n, w in named.items()})
    return found.with_(tokens=() if rows is None else (rows,))


def _weights(state: dict, source: str, rename: Callable[[str], str], kind: str) -> Content:
    """Sort a delta's entries into whole weights and compressed ones, {"u": (out, r), "v": (r, in)}."""
    content = Content(f"Custom Diffusion's {kind}")
    for name, value in state.items():
        if isinstance(value, Tensor):
            content.weights[rename(name)] = value.detach()
        elif isinstance(value, Mapping) and all(isinstance(value.get(key), Tensor) and value[key].ndim == 2 for key in "uv"):
            content.low_rank[rename(name)] = LowRank(value["u"].detach(), value["v"].detach())
        else:
            raise UserError(f"{source} holds {type(value).__name__} as '{name}': expected a weight, or its factors u and v")
    return content.with_(kind=f"Custom Diffusion's compressed {kind}") if content.low_rank else content


def _rows(value: object, source: str) -> Tensor:
    """Return a token's embedding, or several, as rows (n, d)."""
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):  # SDXL's: one for each encoder
        return torch.cat([_rows(part, source) for part in value if isinstance(part, Tensor)], dim=-1)
    if not isinstance(value, Tensor) or value.ndim not in (1, 2):
        raise UserError(f"{source} holds a token that is no embedding: expected numbers (n, d)")
    return value.detach().view(-1, value.shape[-1])


def write_ckpt(weights: dict[str, Tensor], modifiers: Tensor) -> tuple[dict, list[str]]:
    """Return the content of a delta.ckpt, and the weights that it cannot carry."""
    carried = {name: _single(weight) for name, weight in weights.items() if ".attn2." in name}
    embed = {EMBED: _single(modifiers)} if len(modifiers) else {}
    return {"state_dict": carried | embed}, [name for name in weights if name not in carried]


def write_bin(weights: dict[str, Tensor], tokens: dict[str, Tensor], layers: Layers) -> dict:
    """Return the content of a delta.bin; it cannot carry what a delta.ckpt cannot either, see `write_ckpt`.

    Args:
        tokens: name of each modifier token -> its embedding (d,).
    """
    theirs = {place.name: name for name, place in layers.unet.items()}
    unet = {
        f"{theirs[layer_of(name)]}.{name.rpartition('.')[2]}": _single(weight)
        for name, weight in weights.items()
        if ".attn2." in name
    }
    return {"unet": unet, "modifier_token": {name: _parts(row, layers) for name, row in tokens.items()}}


def _parts(row: Tensor, layers: Layers) -> Tensor | list[Tensor]:
    """An embedding, or with two text encoders a list of both."""
    parts = [_single(part) for part in row.split(layers.config.token_widths, dim=-1)]
    return parts if len(parts) > 1 else parts[0]


def _single(tensor: Tensor) -> Tensor:
    """In fp32, as the loaders expect it; a copy, so that a slice brings no more than itself into the file."""
    return tensor.detach().float().cpu().clone()
