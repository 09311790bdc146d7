"""The concept file: everything that fine-tuning learned, in one .safetensors file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dci import __version__
from ldm.checkpoint import fingerprint, read_safetensors
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

FORMAT = "dci-concept"
_MODIFIERS, _PREFIXES, _SUFFIXES = "modifier_tokens", "contexts.prefix", "contexts.suffix"


@dataclass(frozen=True)
class Concept:
    """A learned concept."""

    keys_values: dict[str, Tensor]  # SD name -> weight of every cross-attention to_k and to_v
    modifiers: Tensor  # embeddings of the modifier tokens (k, d)
    prefixes: Tensor  # image-specific contexts (pictures, p, d); of use for study, not for sampling
    suffixes: Tensor  # (pictures, s, d)
    modifier_tokens: tuple[str, ...]  # their names, such as ("<new1>", "<new2>")
    class_noun: str
    base: str  # fingerprint of the base model
    base_name: str
    config: dict  # the resolved configuration of the run that made it
    version: str = __version__  # of this package

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file; tensors keep their precision."""
        tensors = {**self.keys_values, _MODIFIERS: self.modifiers, _PREFIXES: self.prefixes, _SUFFIXES: self.suffixes}
        metadata = {
            "format": FORMAT,
            "version": self.version,
            "class_noun": self.class_noun,
            "modifier_tokens": json.dumps(self.modifier_tokens),
            "base": self.base,
            "base_name": self.base_name,
            "config": json.dumps(self.config),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @staticmethod
    def load(path: str | Path) -> "Concept":
        """Read a concept file.

        Raises:
            UserError: the file is missing, broken, or not a concept file.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a concept file: give the concept.safetensors that scripts/train_ico.py wrote")
        return Concept(
            modifiers=tensors.pop(_MODIFIERS),
            prefixes=tensors.pop(_PREFIXES),
            suffixes=tensors.pop(_SUFFIXES),
            keys_values=tensors,
            modifier_tokens=tuple(json.loads(metadata["modifier_tokens"])),
            class_noun=metadata["class_noun"],
            base=metadata["base"],
            base_name=metadata["base_name"],
            config=json.loads(metadata["config"]),
            version=metadata["version"],
        )

    def apply(self, model: LatentDiffusion) -> Callable[[], None]:
        """Put the concept's keys and values into its base model.

        Returns:
            A function that puts the base model's own back.

        Raises:
            UserError: the concept was learned on another base model.
        """
        found = fingerprint(model)
        if found != self.base:
            raise UserError(
                f"this concept was learned on the base model '{self.base_name}' ({self.base}), "
                f"but '{model.config.name}' ({found}) is loaded: give the right one with --model and --checkpoint"
            )
        parameters = dict(model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.keys_values}
        _copy(self.keys_values, parameters)
        return lambda: _copy(before, parameters)


@torch.no_grad()
def _copy(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        parameters[name].copy_(weight)
