"""Open foreign files and recognise their kinds; nothing in them is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dci.concept.foreign import adobe, custom_diffusion, dci_ico, embeddings, lora, whole_model
from dci.concept.foreign.content import Content
from dci.concept.foreign.layers import Layers
from dci.concept.foreign.metadata import facts_of
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.diffusers_folder import is_diffusers_folder
from ldm.formats.weights import open_weights, read_content
from ldm.shipped import find

ADAPTER = "adapter_model.safetensors"  # how PEFT itself calls a file, with adapter_config.json beside it

_OTHER = "give the model that it was made for as model="


@dataclass(frozen=True)
class Opened:
    """A file's content before it is understood."""

    source: str  # for messages
    content: dict[Any, Any]
    metadata: dict[str, str]


def open_file(name: str | Path) -> Opened:
    """Open a foreign file, a diffusers folder, or a folder that PEFT or diffusers saved a LoRA in.

    Raises:
        UserError: it is missing, broken, hostile, or holds no mapping.
    """
    path = find(name)
    if path.is_dir() and is_diffusers_folder(path):
        return Opened(str(name), dict(open_weights(path).state), {})
    if path.is_dir():
        known = (ADAPTER, "pytorch_lora_weights.safetensors", custom_diffusion.WEIGHTS)
        inside = next((path / file for file in known if (path / file).is_file()), None)
        if inside is None:
            raise UserError(f"{name} is a folder without a model or a concept: expected one of {', '.join(known)} in it")
        path = inside
    content, metadata = read_content(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds {type(content).__name__ if content else 'nothing'}, expected weights by their names")
    return Opened(str(path), dict(content), {**(metadata or {}), **_adapter_config(path)})


def _adapter_config(path: Path) -> dict[str, str]:
    """Return PEFT's configuration beside its file, under the name that it has in headers."""
    config = path.with_name("adapter_config.json")
    if path.name != ADAPTER or not config.is_file():
        return {}
    return {lora.PEFT_CONFIG: config.read_text(encoding="utf-8", errors="replace")}


def understand(opened: Opened, layers: Layers, base: Callable[[], LatentDiffusion | None], which: str) -> Content:
    """Return the content of an opened file: weights, changes and tokens.

    Args:
        base: returns the base model, which a model tuned as a whole is compared with; None where there is none.
        which: of such a model, see `whole_model.WEIGHTS`.

    Raises:
        UserError: the file is of no known kind, or made for another model.
    """
    content, source = opened.content, opened.source
    ico = dci_ico.state_of(content)
    if ico is not None:
        found = dci_ico.read(ico, source)
    elif custom_diffusion.is_custom_diffusion(content):
        found = custom_diffusion.read(content, layers, source)
    elif adobe.is_delta_ckpt(content):
        found = adobe.read_ckpt(content, source)
    elif adobe.is_delta_bin(content):
        found = adobe.read_bin(content, layers, source)
    elif embeddings.is_embedding(content):
        found = embeddings.read(content, source)
    else:
        found = _tensors(opened, layers, base, which)
    _check(found, layers, source)
    return found.with_(facts=facts_of(opened.metadata))


def _tensors(opened: Opened, layers: Layers, base: Callable[[], LatentDiffusion | None], which: str) -> Content:
    """Understand a file of tensors by their names: a LoRA with what is bundled into it, or a whole model."""
    source, state = opened.source, _state(opened)
    if whole_model.is_whole_model(state):
        return whole_model.read(state, base(), which, source)
    state, rows = embeddings.unbundle(state, source)
    if lora.is_lora(state):
        return lora.read(state, opened.metadata, layers, source).with_(tokens=rows)
    if rows:
        return Content("bundled embeddings", tokens=rows)
    first = next(iter(state))
    raise UserError(
        f"{source} is not a concept file, nor of another kind that is known here (it has '{first}'): "
        "expected a LoRA, differences, an embedding, a delta of Custom Diffusion, or a tuned model"
    )


def _state(opened: Opened) -> dict[str, Tensor]:
    nested = opened.content.get("state_dict")
    state = dict(nested) if isinstance(nested, Mapping) else opened.content
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors:
        raise UserError(f"{opened.source} holds no tensors by their names: expected the weights of a concept")
    return tensors


def _check(content: Content, layers: Layers, source: str) -> None:
    """Raise UserError for weights or tokens that do not fit the model, or hold no finite numbers."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(w.shape) for name, w in (content.weights | content.changes).items()}
    shapes |= {name: (len(change.u), *change.v.shape[1:]) for name, change in content.low_rank.items()}
    for name, shape in shapes.items():
        expected = layers.shapes.get(name)
        if expected is None or tuple(expected) != shape:
            has = f"{tuple(expected)} in" if expected else "nothing of that name in"
            raise UserError(f"{source}: {name} is {shape}, with {has} the model '{layers.config.name}': {_OTHER}")
    width = sum(layers.config.token_widths)
    for rows in content.tokens:
        if rows.shape[1] != width:
            own = f"{rows.shape[1]} wide, those of the model '{layers.config.name}' {width}"
            raise UserError(f"{source}: its tokens are {own}: {_OTHER}")
    factors = [factor for change in content.low_rank.values() for factor in change]
    for tensor in (*content.weights.values(), *content.changes.values(), *content.tokens, *factors):
        if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.isfinite().all():
            raise UserError(
                f"{source} holds numbers of another kind, NaN or infinite ones: expected finite fp16, bf16 or fp32"
            )
