"""The concept file: everything that fine-tuning learned, in one .safetensors file."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dci import __version__
from dci.files import safetensors_bytes, write_atomically
from dci.tokens import Subject
from ldm.checkpoint import PRECISIONS, fingerprint, read_safetensors
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

FORMAT = "dci-concept"
_MODIFIERS, _PREFIXES, _SUFFIXES = "modifier_tokens", "contexts.prefix", "contexts.suffix"
_U, _V = ".u", ".v"  # endings of the names of a low-rank change's factors

_LEARNED = {"modifiers": _MODIFIERS, "prefixes": _PREFIXES, "suffixes": _SUFFIXES}


class LowRank(NamedTuple):
    """A change of a weight: W = W_base + u v."""

    u: Tensor  # (rows, r)
    v: Tensor  # (r, columns)


@dataclass(frozen=True)
class Concept:
    """A learned concept, or several learned together or merged."""

    keys_values: dict[str, Tensor]  # SD name -> cross-attention weight that was trained (to_k and to_v, as a rule)
    modifiers: Tensor  # embeddings of the modifier tokens (k, d)
    prefixes: Tensor  # image-specific contexts (pictures, p, d); of use for study, not for sampling
    suffixes: Tensor  # (pictures, s, d)
    modifier_tokens: tuple[str, ...]  # their names, such as ("<new1>", "<new2>")
    class_noun: str  # of the first concept
    base: str  # fingerprint of the base model
    base_name: str
    config: dict  # the resolved configuration of the run that made it
    version: str = __version__  # of this package
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # SD name -> change, in place of a whole weight
    several: tuple[Subject, ...] = ()  # the concepts, where the file holds more than one

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The concepts in the file, one or several."""
        return self.several or (Subject(self.modifier_tokens, self.class_noun),)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all; tensors keep their precision."""
        tensors = {**self.keys_values, _MODIFIERS: self.modifiers, _PREFIXES: self.prefixes, _SUFFIXES: self.suffixes}
        for name, change in self.low_rank.items():
            tensors |= {name + _U: change.u, name + _V: change.v}
        metadata = {
            "format": FORMAT,
            "version": self.version,
            "class_noun": self.class_noun,
            "modifier_tokens": json.dumps(self.modifier_tokens),
            "base": self.base,
            "base_name": self.base_name,
            "config": json.dumps(self.config),
            "subjects": json.dumps(self.several),
        }
        write_atomically(path, safetensors_bytes(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> "Concept":
        """Read a concept file.

        Raises:
            UserError: the file is missing, broken, or not a concept file.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a concept file: give the concept.safetensors that scripts/train_ico.py wrote")
        for name, tensor in tensors.items():
            if tensor.dtype not in PRECISIONS or not tensor.isfinite().all():
                raise UserError(f"{path} cannot be used: {name} holds numbers of another kind, NaN or infinite ones: "
                                "expected finite fp16, bf16 or fp32")  # fmt: skip
        try:
            return _parsed(tensors, metadata)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is a damaged concept file ({error}): fetch or make it anew") from error

    def weights(self, model: LatentDiffusion) -> dict[str, Tensor]:
        """Return the whole weights that the concept sets, in fp32 on the CPU.

        Args:
            model: the base model, without the concept.
        """
        base = model.state_dict()
        changed = {n: base[n].float().cpu() + c.u.float() @ c.v.float() for n, c in self.low_rank.items()}
        return {name: weight.float() for name, weight in self.keys_values.items()} | changed

    def apply(self, model: LatentDiffusion) -> Callable[[], None]:
        """Put the concept's keys and values into its base model.

        Returns:
            A function that puts the base model's own back.

        Raises:
            UserError: the concept was learned on another base model.
        """
        before = self.replaced(model)
        parameters = dict(model.named_parameters())
        _copy(self.weights(model), parameters)
        return lambda: _copy(before, parameters)

    def replaced(self, model: LatentDiffusion) -> dict[str, Tensor]:
        """Return a copy of the base model's weights that the concept will take the place of.

        Args:
            model: the base model, without the concept.

        Raises:
            UserError: the concept was learned on another base model.
        """
        self.check_base(model)
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach().clone() for name in (*self.keys_values, *self.low_rank)}

    def check_base(self, model: LatentDiffusion) -> None:
        """Raise UserError if the concept was learned on another base model, or its weights do not fit."""
        found = fingerprint(model)
        if found != self.base:
            raise UserError(
                f"this concept was learned on the base model '{self.base_name}' ({self.base}), "
                f"but '{model.config.name}' ({found}) is loaded: give the right one with --model and --checkpoint"
            )
        self.check_fits(model)

    def check_fits(self, model: LatentDiffusion) -> None:
        """Raise UserError for tokens or weights of other shapes than the model has."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        own = {name: weight.shape for name, weight in self.keys_values.items()}
        own |= {name: (len(change.u), change.v.shape[1]) for name, change in self.low_rank.items()}
        wrong = [name for name, shape in own.items() if shapes.get(name) != shape]
        width = model.text_encoder.token_table.shape[1]
        if self.modifiers.shape[1] != width:
            wrong.append(f"{_MODIFIERS}, {self.modifiers.shape[1]} wide in place of {width}")
        if wrong:
            raise UserError(f"this concept does not fit its base model '{model.config.name}': {', '.join(wrong[:3])}: "
                            "the file is damaged")  # fmt: skip


def _parsed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Concept:
    """Return the concept that a file's content stands for.

    Raises:
        KeyError, ValueError, TypeError: something is missing, or does not go with the rest.
    """
    learned = {name: tensors.pop(key) for name, key in _LEARNED.items()}
    changed = [name.removesuffix(_U) for name in tensors if name.endswith(_U)]
    concept = Concept(
        **learned,
        low_rank={name: LowRank(tensors.pop(name + _U), tensors.pop(name + _V)) for name in changed},
        keys_values=tensors,
        modifier_tokens=tuple(json.loads(metadata["modifier_tokens"])),
        class_noun=metadata["class_noun"],
        base=metadata["base"],
        base_name=metadata["base_name"],
        config=dict(json.loads(metadata["config"])),
        version=metadata["version"],
        several=tuple(Subject(tuple(tokens), noun) for tokens, noun in json.loads(metadata.get("subjects", "[]"))),
    )
    number = sum(len(subject.modifier_tokens) for subject in concept.subjects)
    if concept.modifiers.ndim != 2 or len(concept.modifiers) != number:
        raise ValueError(f"{_MODIFIERS} is {tuple(concept.modifiers.shape)}, expected {number} rows")
    if concept.prefixes.ndim != 3 or concept.suffixes.ndim != 3:
        raise ValueError("contexts of another shape than (pictures, tokens, width)")
    for name, change in concept.low_rank.items():
        if change.u.ndim != 2 or change.v.ndim != 2 or change.u.shape[1] != len(change.v):
            raise ValueError(f"the factors of {name} do not go together")
    return concept


@torch.no_grad()
def _copy(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        parameters[name].copy_(weight)
