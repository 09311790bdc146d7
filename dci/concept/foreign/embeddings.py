"""Embeddings of tokens (textual inversion) in every form that programs write, and inside LoRA files."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dci.concept.foreign.content import Content
from ldm.errors import UserError

BUNDLE = "bundle_emb."
_PARAM = ".string_to_param."
_XL = ("clip_l", "clip_g")  # the halves of SDXL's embeddings, in the order of its encoders


def is_embedding(content: Mapping) -> bool:
    """Whether a file's content is an embedding: A1111's, or tensors of one or two dimensions by the tokens' names."""
    if isinstance(content.get("string_to_param"), Mapping):
        return True
    values = [value for value in content.values() if isinstance(value, Tensor)]
    names = [str(name) for name in content]
    return (
        bool(values)
        and len(values) == len(content)
        and (len(values) == 1 or set(names) == set(_XL) or all(name.startswith("<") for name in names))
        and all(value.ndim in (1, 2) for value in values)
        and not any(name.endswith((".weight", ".bias")) for name in names)
    )


def read(content: Mapping, source: str) -> Content:
    """Return an embedding's rows.

    Raises:
        UserError: it holds one half alone of an embedding of SDXL, or no numbers.
    """
    inner = content.get("string_to_param")
    values = list((inner if isinstance(inner, Mapping) else content).values())
    if set(content) & set(_XL):
        return Content("an embedding of SDXL (textual inversion)", tokens=(_pair(content, source),))
    tokens = []
    for value in values:
        if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.numel():
            raise UserError(f"{source} holds an embedding without numbers: expected (n, d)")
        tokens.append(value.detach().view(-1, value.shape[-1]))
    kind = "A1111's embedding" if isinstance(inner, Mapping) else "an embedding (textual inversion)"
    return Content(kind, tokens=tuple(tokens))


def _pair(content: Mapping, source: str) -> Tensor:
    """The halves of SDXL's embeddings beside each other (n, d_1 + d_2), as our concept files hold them."""
    halves = [content.get(name) for name in _XL]
    rows = [half.detach().view(-1, half.shape[-1]) for half in halves if isinstance(half, Tensor) and half.ndim in (1, 2)]
    if len(rows) != len(_XL) or len(rows[0]) != len(rows[1]):
        raise UserError(f"{source} holds an embedding of SDXL that is not whole: expected {' and '.join(_XL)} (n, d)")
    return torch.cat([half.float() for half in rows], dim=1)


def unbundle(state: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Return a LoRA's tensors without the embeddings that lie among them, and these.

    Raises:
        UserError: they are no embeddings.
    """
    inside = {name: tensor for name, tensor in state.items() if name.startswith(BUNDLE)}
    rows: list[Tensor] = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in inside.items():
        word, _, half = name.rpartition(".")
        if half in _XL:
            pairs.setdefault(word, {})[half] = tensor
            continue
        if _PARAM not in name or tensor.ndim not in (1, 2):
            raise UserError(
                f"{source} bundles '{name}', which is no embedding of this model: expected {BUNDLE}NAME{_PARAM}*"
            )
        rows.append(tensor.view(-1, tensor.shape[-1]))
    rows += [_pair(halves, f"{source}: {word}") for word, halves in pairs.items()]
    return {name: tensor for name, tensor in state.items() if name not in inside}, tuple(rows)


def bundled_words(names: Iterable[str]) -> list[str]:
    """Return the words of the embeddings among a LoRA's tensors."""
    inside = [name.removeprefix(BUNDLE).partition(_PARAM)[0] for name in names if name.startswith(BUNDLE)]
    return list(dict.fromkeys(word.removesuffix(".clip_l").removesuffix(".clip_g") for word in inside))


def write(name: str, rows: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of a file that holds one embedding (n, d), in fp32.

    Args:
        widths: of its parts, one for each text encoder.
    """
    if len(widths) == 1:
        return {name: rows.detach().float().cpu().clone()}
    parts = rows.detach().float().cpu().split(list(widths), dim=-1)
    return {half: part.clone() for half, part in zip(_XL, parts, strict=True)}


def bundle(name: str, rows: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors that bring an embedding (n, d) into a LoRA's file."""
    place = f"{name}{_PARAM}*" if len(widths) == 1 else name
    tensors = write(place, rows, widths)
    return {BUNDLE + (key if len(widths) == 1 else f"{name}.{key}"): tensor for key, tensor in tensors.items()}
