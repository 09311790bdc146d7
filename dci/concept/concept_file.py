"""The concept file: everything that fine-tuning learned, in one .safetensors file."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dci.concept.modifier_tokens import ConceptName
from dci.concept.trained_on import TrainedOn
from dci.files import safetensors_bytes, write_atomically
from dci.version import __version__
from ldm.checkpoint import PRECISIONS, fingerprint, read_safetensors
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.runtime.cpu_convolutions import unpack

FORMAT = "dci-concept"
FORMAT_VERSION = 2
"""Number of the file's format: rises when files change so that older programs would misread them.

The second has changes of any weight, words of the vocabulary for a concept's name, and files without a base's fingerprint;
what has none of these is written as the first.
"""

_MODIFIERS, _PREFIXES, _SUFFIXES = "modifier_tokens", "contexts.prefix", "contexts.suffix"
_U, _V = ".u", ".v"  # endings of the names of a low-rank change's factors
_CHANGE = ".change"  # ending of the name of a whole change

_LEARNED = {"modifiers": _MODIFIERS, "prefixes": _PREFIXES, "suffixes": _SUFFIXES}


class LowRank(NamedTuple):
    """A change of a weight: W = W_base + u v."""

    u: Tensor  # (rows, r)
    v: Tensor  # (r, columns), of a convolution (r, channels, height, width)

    def product(self) -> Tensor:
        """Return the change itself, in fp32 and the shape of the weight."""
        return (self.u.float() @ self.v.float().flatten(1)).view(len(self.u), *self.v.shape[1:])


@dataclass(frozen=True)
class Concept:
    """A learned concept, or several learned together or merged."""

    keys_values: dict[str, Tensor]  # SD name -> cross-attention weight that was trained (to_k and to_v, as a rule)
    modifiers: Tensor  # embeddings of the modifier tokens (k, d)
    prefixes: Tensor  # image-specific contexts (images, p, d); of use for study, not for sampling
    suffixes: Tensor  # (images, s, d)
    names: tuple[ConceptName, ...]  # of the concepts, one or several
    base: str  # fingerprint of the base model; "" where an imported file does not have it
    base_name: str
    config: dict  # the resolved configuration of the run that made it
    version: str = __version__  # of this package
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # SD name -> change, in place of a whole weight
    changes: dict[str, Tensor] = field(default_factory=dict)  # SD name -> W - W_base, of any rank

    @property
    def trained_on(self) -> TrainedOn:
        """The base model and the images, as the training's configuration names them."""
        return TrainedOn.of(self.config)

    @property
    def modifier_tokens(self) -> tuple[str, ...]:
        """All learned modifier tokens, in the order of their embeddings."""
        return tuple(token for name in self.names for token in name.learned)

    @property
    def class_noun(self) -> str:
        """Class noun of the first concept."""
        return self.names[0].class_noun

    def describe(self) -> str:
        """Return the concepts' names, such as "<new1> <new2> dog"."""
        return " and ".join(" ".join([*name.modifier_tokens, name.class_noun]) for name in self.names)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all; tensors keep their precision."""
        tensors = {**self.keys_values, _MODIFIERS: self.modifiers, _PREFIXES: self.prefixes, _SUFFIXES: self.suffixes}
        for name, change in self.low_rank.items():
            tensors |= {name + _U: change.u, name + _V: change.v}
        tensors |= {name + _CHANGE: change for name, change in self.changes.items()}
        tokens = [token for name in self.names for token in name.modifier_tokens]
        further = self.changes or not self.base or any(".attn2." not in name for name in self.changed)
        further = further or len(tokens) > len(self.modifiers)
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION if further else 1),
            "version": self.version,
            "class_noun": self.class_noun,
            "modifier_tokens": json.dumps(tokens),
            "base": self.base,
            "base_name": self.base_name,
            "config": json.dumps(self.config),
            "subjects": json.dumps(self.names if len(self.names) > 1 else ()),
        }
        write_atomically(path, safetensors_bytes(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> "Concept":
        """Read a concept file.

        Raises:
            UserError: the file is missing, broken, of a newer format, or not a concept file.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a concept file: give the concept.safetensors that training wrote")
        _check_format(metadata.get("format_version", "1"), path)  # the first files have no number
        for name, tensor in tensors.items():
            if tensor.dtype not in PRECISIONS or not tensor.isfinite().all():
                raise UserError(
                    f"{path} cannot be used: {name} holds numbers of another kind, NaN or infinite ones: "
                    "expected finite fp16, bf16 or fp32"
                )
        try:
            return _parsed(tensors, metadata)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is a damaged concept file ({error}): fetch or make it anew") from error

    @property
    def changed(self) -> tuple[str, ...]:
        """SD names of the weights that the concept changes."""
        return (*self.keys_values, *self.low_rank, *self.changes)

    def weights(self, model: LatentDiffusion) -> dict[str, Tensor]:
        """Return the whole weights that the concept sets, in fp32 on the CPU.

        Args:
            model: the base model, without the concept.
        """
        base = model.state_dict()
        changes = {name: change.product() for name, change in self.low_rank.items()} | self.changes
        changed = {name: base[name].float().cpu() + change.float() for name, change in changes.items()}
        return {name: weight.float() for name, weight in self.keys_values.items()} | changed

    def apply(self, model: LatentDiffusion) -> Callable[[], None]:
        """Put the concept's weights into its base model.

        While it is there the model is marked with it, and takes no other: a second one, or the same again, would
        build on weights that are no longer the base model's.

        Returns:
            A function that puts the base model's own back; once, calling it again does nothing.

        Raises:
            UserError: the concept was learned on another base model, or a concept is applied already.
        """
        before = self.replaced(model)
        _copy(self.weights(model), model)
        model.applied = self.describe()
        there = True

        def undo() -> None:
            nonlocal there
            if there:
                _copy(before, model)
                model.applied, there = None, False

        return undo

    def replaced(self, model: LatentDiffusion) -> dict[str, Tensor]:
        """Return a copy of the base model's weights that the concept will replace.

        Args:
            model: the base model, without the concept.

        Raises:
            UserError: the concept was learned on another base model.
        """
        self.check_base(model)
        unpack(model.unet)
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach().clone() for name in self.changed}

    def check_base(self, model: LatentDiffusion) -> None:
        """Raise UserError if the concept was learned on another base model, or is not alone, or its weights do not fit."""
        check_bare(model)
        found = fingerprint(model)
        if self.base and found != self.base:
            raise UserError(
                f"this concept was learned on the base model '{self.base_name}' ({self.base}), "
                f"but '{model.config.name}' ({found}) is loaded: give the right one as model= and checkpoint="
            )
        self.check_fits(model)

    def check_fits(self, model: LatentDiffusion) -> None:
        """Raise UserError for tokens or weights of other shapes than the model has."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        own = {name: weight.shape for name, weight in self.keys_values.items()}
        own |= {name: torch.Size((len(change.u), *change.v.shape[1:])) for name, change in self.low_rank.items()}
        own |= {name: change.shape for name, change in self.changes.items()}
        wrong = [name for name, shape in own.items() if shapes.get(name) != shape]
        width = sum(table.shape[1] for table in model.text_encoder.token_tables)
        if self.modifiers.shape[1] != width:
            wrong.append(f"{_MODIFIERS}, {self.modifiers.shape[1]} wide in place of {width}")
        if wrong and not self.base:
            raise UserError(
                f"this concept does not fit the model '{model.config.name}': {', '.join(wrong[:3])}: its file does not tell "
                "the base model: give the one that it was made on as model="
            )
        if wrong:
            raise UserError(
                f"this concept does not fit its base model '{model.config.name}': {', '.join(wrong[:3])}: "
                "the file is damaged"
            )


def check_bare(model: LatentDiffusion) -> None:
    """Raise UserError for a model that a concept is applied to: it is not the base model that others build on."""
    if model.applied is not None:
        raise UserError(
            f"the model '{model.config.name}' has the concept {model.applied} applied, and other concepts build on the base "
            "model alone: take it off first, with the function that apply returned, or load the model anew"
        )


def _check_format(number: str, path: str | Path) -> None:
    """Raise UserError for a file that this version cannot read."""
    if not number.isdecimal() or not 1 <= int(number) <= FORMAT_VERSION:
        raise UserError(
            f"{path} is a concept file of format {number}: this version ({__version__}) reads up to {FORMAT_VERSION}; "
            "update the package dci"
        )


def _parsed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Concept:
    """Return the concept that a file's content stands for.

    Raises:
        KeyError, ValueError, TypeError: something is missing, or does not go with the rest.
    """
    learned = {name: tensors.pop(key) for name, key in _LEARNED.items()}
    low_rank = [name.removesuffix(_U) for name in tensors if name.endswith(_U)]
    changes = [name.removesuffix(_CHANGE) for name in tensors if name.endswith(_CHANGE)]
    concept = Concept(
        **learned,
        low_rank={name: LowRank(tensors.pop(name + _U), tensors.pop(name + _V)) for name in low_rank},
        changes={name: tensors.pop(name + _CHANGE) for name in changes},
        keys_values=tensors,
        names=_names(metadata),
        base=metadata["base"],
        base_name=metadata["base_name"],
        config=dict(json.loads(metadata["config"])),
        version=metadata["version"],
    )
    number = len(concept.modifier_tokens)
    if concept.modifiers.ndim != 2 or len(concept.modifiers) != number:
        raise ValueError(f"{_MODIFIERS} is {tuple(concept.modifiers.shape)}, expected {number} rows")
    if concept.prefixes.ndim != 3 or concept.suffixes.ndim != 3:
        raise ValueError("contexts of another shape than (images, tokens, width)")
    for name, change in concept.low_rank.items():
        if change.u.ndim != 2 or change.v.ndim not in (2, 4) or change.u.shape[1] != len(change.v):
            raise ValueError(f"the factors of {name} do not go together")
    return concept


def _names(metadata: dict[str, str]) -> tuple[ConceptName, ...]:
    """Return the concepts' names; a file of a single concept has no list of them."""
    own = (json.loads(metadata["modifier_tokens"]), metadata["class_noun"])
    return tuple(ConceptName(tuple(tokens), noun) for tokens, noun in json.loads(metadata.get("subjects", "[]")) or [own])


@torch.no_grad()
def _copy(weights: dict[str, Tensor], model: LatentDiffusion) -> None:
    unpack(model.unet)  # which puts other parameters in the place of packed ones
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
