"""Weights of every format, opened by their file, folder or hub id."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.formats import diffusers_folder, hub
from ldm.formats.pickled import read_pickled
from ldm.formats.recognise import recognise, refuse_foreign
from ldm.shipped import find
from ldm.texts import openable

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Weights:
    """A state dict under SD's names, and its model's configuration."""

    source: str  # for messages
    state: dict[str, Tensor]
    config: Callable[[], ModelConfig]  # raises UserError where it cannot be inferred


def are_weights(name: str | Path) -> bool:
    """Whether a name stands for weights, rather than for a YAML file."""
    return find(name).is_dir() or str(name).lower().endswith(SUFFIXES) or hub.is_hub_id(name)


def open_weights(name: str | Path, half: bool = False) -> Weights:
    """Open weights; tensors stay in the files until they are used, where the format allows it.

    Args:
        name: .ckpt or .safetensors file, a folder of .safetensors files, a diffusers folder, or a hub id.
        half: of a model that is there in two precisions, take fp16.

    Raises:
        UserError: nothing there, a broken or hostile file, or a model of another kind.
    """
    path = hub.snapshot(str(name), half) if hub.is_hub_id(name) else find(name)
    if path.is_dir() and diffusers_folder.is_diffusers_folder(path):
        config = diffusers_folder.read_config(path)
        state = diffusers_folder.read_state(path, config, half, lambda file: read_file(file)[0])
        return Weights(str(name), state, lambda: config)
    state, step = read_file(path) if path.is_file() else (read_state_dict(path), None)
    refuse_foreign(state, name)
    return Weights(str(name), _unwrapped(state), lambda: recognise(state, name, step))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read one file, or all .safetensors files of a folder, into one state dict.

    Raises:
        UserError: nothing there, or a file is broken.
    """
    path = find(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"no checkpoint at {path}: expected a .ckpt or .safetensors file, a folder of .safetensors files, or a "
            "diffusers folder"
        )
    state = {}
    for file in files:
        state.update(read_file(file)[0])
    return state


def read_file(file: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """Return a file's tensors, and the number of training steps that it speaks of, if it does.

    The format is taken from the content; the ending matters only for files that must be .safetensors.

    Raises:
        UserError: the file is missing, broken, hostile, or no checkpoint.
    """
    content, metadata = read_content(file)
    return (_bare(content), None) if metadata is not None else _tensors(content, Path(file))


def read_content(file: str | Path) -> tuple[Any, dict[str, str] | None]:
    """Return what a file holds, and the metadata in its header; None of a pickled file, which has none.

    Raises:
        UserError: the file is missing, broken, hostile, or neither a .safetensors nor a pickled file.
    """
    file = find(file)
    if not file.is_file():
        raise UserError(f"no file {file}: expected a .ckpt or .safetensors file")
    with open(file, "rb") as stream:
        head = stream.read(64)
    if file.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(file)
    if not head:
        raise UserError(f"{file} is empty: fetch or make it anew")
    if not head.startswith((b"PK", b"\x80")):
        pointer = head.startswith(b"version https://git-lfs")
        what = "a Git LFS pointer (git lfs pull fetches the file)" if pointer else "no checkpoint"
        raise UserError(f"{file} is {what}: expected a .ckpt or .safetensors file")
    return read_pickled(file), None


def read_safetensors(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a .safetensors file's tensors, memory-mapped, and metadata.

    Raises:
        UserError: the file is missing, or is not a whole .safetensors file.
    """
    file = find(file)
    if not file.is_file():
        raise UserError(f"no file {file}: expected a .safetensors file")
    try:
        with openable(file) as path, safe_open(path, framework="pt") as content:
            return {key: content.get_tensor(key) for key in list(content.keys())}, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole .safetensors file ({error}): fetch or make it anew") from error


def _tensors(content: object, file: Path) -> tuple[dict[str, Tensor], int | None]:
    """Return the state dict in a pickled file's content, nested in a training's state or by itself."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds {type(content).__name__}, expected a state dict")
    step = content.get("global_step")
    nested = _nested(content)
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if nested is None else nested
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            what = f"{type(name).__name__} {name}: {type(value).__name__}"
            raise UserError(f"{file} holds {what} in its state dict, expected tensors by their names")
    return {name: tensor.detach() for name, tensor in _bare(state).items()}, step if isinstance(step, int) else None


_NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers put the weights, one in the other: Lightning, plain loops, DeepSpeed."""

_WRAPPER, _COMPILED = "module.", "_orig_mod."


_DEEPEST = 4  # nests in one another; a hostile file may hold itself


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what parallel training puts before each name, and torch.compile into some."""
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    wrapped = bool(state) and all(name.startswith(_WRAPPER) for name in state)
    return {name.removeprefix(_WRAPPER): tensor for name, tensor in state.items()} if wrapped else dict(state)


def _nested(content: Mapping, depth: int = _DEEPEST) -> Mapping | None:
    """The innermost state dict of a training's state; None: the content is it.

    Trainers also keep a model's settings under these names: what holds tensors goes before what holds none.
    """
    inside = [content[key] for key in _NESTS if isinstance(content.get(key), Mapping)]
    found = next((nest for nest in inside if _holds_tensors(nest, depth)), next(iter(inside), None))
    if found is None or not depth:
        return found
    return found if (inner := _nested(found, depth - 1)) is None else inner


def _holds_tensors(content: Mapping, depth: int) -> bool:
    if any(isinstance(value, Tensor) for value in content.values()):
        return True
    nests = (content[key] for key in _NESTS if isinstance(content.get(key), Mapping))
    return depth > 0 and any(_holds_tensors(nest, depth - 1) for nest in nests)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put SD's `text_model.` where files written with newer transformers leave it away."""
    place = "cond_stage_model.transformer."
    bare = tuple(place + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
    return {
        name.replace(place, place + "text_model.") if name.startswith(bare) else name: tensor
        for name, tensor in state.items()
    }
