"""Fine-tuning configurations: the file's options, the user's in place of them, and those that no run could use."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from dci.concept.loras import parse_lora
from dci.concept.modifier_tokens import ConceptName, modifier_names
from dci.concept.prompts import parse_prompt
from dci.finetuning.config import ANY_SEED, AUTO, GENERATE, FinetuneConfig, ValidationConfig, concepts_of, entries_of
from dci.finetuning.precision import lightning_name
from ldm import config as configuration
from ldm import extras
from ldm.errors import UserError
from ldm.formats.hub import anchored, is_hub_id
from ldm.shipped import find


def finetune_config(path: str | Path, overrides: Sequence[str] = (), name: str | None = None) -> FinetuneConfig:
    """Read a fine-tuning configuration and make its paths absolute.

    Paths in the file are relative to the file's project, paths in overrides to the current folder.

    Raises:
        UserError: an option that does not exist or has another type, a concept without class noun or images.
    """
    content = _given(configuration.read_yaml(path))
    root = configuration.project_root(path)
    content.setdefault("model", FinetuneConfig.model)
    map_paths(content, lambda key, value: anchored(value, root) if key in _WEIGHTS else str(find(value, root)))
    if isinstance(content.get("loras"), list):
        content["loras"] = [str(find(lora, root)) for lora in content["loras"]]
    # The model's checkpoint goes by this name too.
    overrides = [re.sub(r"^model\.checkpoint=", "checkpoint=", override) for override in overrides]
    config = configuration.build(FinetuneConfig, content, overrides, source=str(path))
    _complete(config, [override.partition("=")[0] for override in overrides], path)
    parts = dataclasses.asdict(config)
    map_paths(parts, lambda key, value: value if key in _WEIGHTS and is_hub_id(value) else str(find(value).resolve()))
    parts["loras"] = [_whole_path(lora) for lora in parts["loras"]]
    config = configuration.build(FinetuneConfig, parts)
    config.name = name or config.name
    _check_name(config.name)
    return config


def _check_name(name: str) -> None:
    """Raise UserError for a run's name that is no part of a folder's name."""
    if not name.strip(". ") or not {"/", "\0", os.sep}.isdisjoint(name):
        raise UserError(f"name '{name}': expected the end of the run folder's name, without /; logdir= says where it is")


def _given(content: dict[str, Any]) -> dict[str, Any]:
    """The options of a file, without those that it leaves to the user (`???`)."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not (isinstance(value, str) and value == "???")
    }


def _complete(config: FinetuneConfig, overridden: list[str], path: str | Path) -> None:
    """Check that each concept is given once, and let the short form show the first of a list."""
    for i, entry in enumerate(entries_of(config)):
        for key, short in (("class_noun", "concept.class_noun"), ("images", "data.images")):
            name = f"concepts[{i}].{key}" if config.concepts else short
            if not getattr(entry, key):
                raise UserError(f"{path}: {name} must be given: add {'it' if config.concepts else f'{name}=VALUE'}")
            if short in overridden and config.concepts and getattr(config.concepts[i], key):
                raise UserError(f"{short} is the short form for one concept, and {name} is given too: leave one of them out")
    if config.concepts:
        first = concepts_of(config)[0]
        config.concept.class_noun, config.data.images = first.class_noun, first.images
        if len(config.concepts) > 1 and config.validation.prompts == ValidationConfig().prompts:
            config.validation.prompts = [f"a photo of a V{i + 1}*" for i in range(len(config.concepts))]


def _whole_path(lora: str) -> str:
    """Return a LoRA, FILE or FILE:0.8, with its file's whole path."""
    file, strength = parse_lora(lora)
    return f"{file.resolve()}:{strength:g}"


_PATHS = (
    ("", "model"),
    ("", "checkpoint"),
    ("", "vae"),
    ("", "resume"),
    ("concept", "images"),
    ("concept", "regularization"),
    ("data", "images"),
    ("data", "regularization"),
    ("generate", "folder"),
)
"""The options of FinetuneConfig that are paths: (section, key); those of `concepts` are like data's."""

_WEIGHTS = ("model", "checkpoint")
"""Those of them that may be ids on the hub instead."""

_NO_PATHS = {"resume": (AUTO,), "regularization": (GENERATE,), "images": (MISSING,)}


def map_paths(content: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Change the paths in a nested mapping of FinetuneConfig's options."""
    sections = [(content.get(section) if section else content, key) for section, key in _PATHS]
    concepts = content.get("concepts")
    for concept in concepts if isinstance(concepts, list) else []:
        sections += [(concept, "images"), (concept, "regularization")]
    for holder, key in sections:
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and holder[key] not in _NO_PATHS.get(key, ()):
            holder[key] = change(key, holder[key])


_AT_LEAST = {
    0: (
        "training.weight_decay",
        "validation.every",
        "validation.seed",
        "context.prefix_length",
        "context.suffix_length",
        "data.background_weight",
        "generate.seed",
    ),
    1: (
        "training.steps",
        "training.batch_size",
        "training.micro_batch",
        "training.save_every",
        "training.checkpoint_every",
        "training.lora_rank",
        "training.keep_last",
        "training.devices",
        "training.nodes",
        "validation.n_samples",
        "validation.steps",
        "generate.number",
        "generate.batch_size",
        "generate.steps",
        "logging.every",
    ),
}
"""Options by the least value that they can have."""

_CHOICES = {
    "data.augment": ("none", "random-resize"),
    "data.crop": ("square", "bucket"),
    "training.gradient_sum": ("fp64", "fp32"),
    "data.on_bad_image": ("error", "skip"),
    "training.trainable": ("crossattn-kv", "crossattn", "none"),
}


def check(config: FinetuneConfig) -> None:
    """Raise UserError for options that no run could use, and for validation prompts without the concept."""

    def value_of(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    for least, names in _AT_LEAST.items():
        for name in names:
            value = value_of(name)
            if value is not None and not value >= least:
                raise UserError(f"{name}={value}: expected {least} or more")
    if config.training.seed < ANY_SEED:
        raise UserError(f"training.seed={config.training.seed}: expected a whole number from 0 on, or {ANY_SEED} for any")
    for name in ("learning_rate", "modifier_learning_rate", "context_learning_rate"):
        value = value_of(f"training.{name}")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"training.{name}={value}: expected a number above 0")
    for name, choices in _CHOICES.items():
        if value_of(name) not in choices:
            raise UserError(f"{name}={value_of(name)}: expected one of {', '.join(choices)}")
    lightning_name(config.training.precision)
    if config.training.lora_rank and config.training.trainable != "crossattn-kv":
        raise UserError(
            f"training.lora_rank={config.training.lora_rank} changes keys and values alone: it needs "
            f"training.trainable=crossattn-kv, not {config.training.trainable}"
        )
    if config.data.crop == "bucket" and config.data.augment != "none":
        raise UserError(
            f"data.crop=bucket does not go with data.augment={config.data.augment}, whose canvas is a square: leave one out"
        )
    if config.logging.tensorboard and extras.is_missing("tensorboard"):
        raise UserError(f"{extras.how_to_install('tensorboard')}, or give logging.tensorboard=false")
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb needs the package wandb: pip install wandb, or logging.wandb=null")
    if config.data.background_weight > 1:
        raise UserError(f"data.background_weight={config.data.background_weight}: expected 0 to 1")
    template = config.context.template
    if template is not None and template.count("{}") != 1:
        raise UserError(f"context.template='{template}': expected {{}} once, where the concept is")
    if not all("{}" in prompt for prompt in config.generate.prompts) or not config.generate.prompts:
        raise UserError(f"generate.prompts={config.generate.prompts}: expected prompts with {{}} for the class noun")
    _check_prompts(config)


def _check_prompts(config: FinetuneConfig) -> None:
    entries = concepts_of(config)
    names = modifier_names([len(entry.initial_words) for entry in entries])
    for tokens, entry in zip(names, entries, strict=True):
        parse_prompt("a V*", ConceptName(tokens, entry.class_noun))
    concepts = tuple(ConceptName(tokens, entry.class_noun) for tokens, entry in zip(names, entries, strict=True))
    if config.validation.every and not config.validation.prompts:
        raise UserError("validation.prompts is empty: give some, or validation.every=0")
    for prompt in config.validation.prompts if config.validation.every else []:
        parse_prompt(prompt, concepts)
