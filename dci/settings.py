"""Settings: what the files say, and what the user says in place of them."""

import dataclasses
import difflib
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dci.config import AUTO, GENERATE, FinetuneConfig, ValidationConfig, subjects
from dci.integration import BASE, FINETUNED, DualBranch
from dci.precision import lightning_name
from dci.prompts import parse_prompt
from dci.tokens import Subject, modifier_names
from ldm import config as configuration
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.hub import anchored, is_hub_id
from ldm.sampling import SamplingOptions, check_options, solver_name


def sampling_options(model: LatentDiffusion, **given: Any) -> SamplingOptions:
    """Return the model's sampling options; those given and not None come first.

    Raises:
        UserError: a value that the model cannot be sampled with.
    """
    defaults = _defaults(model, SamplingOptions)
    size = model.config.image_size
    given = _said(given)
    if "solver" in given and solver_name(given["solver"]) != "ddim":
        defaults["eta"] = 0.0  # the model's default belongs to DDIM; an eta that was asked for is refused
    options = SamplingOptions(**{"height": size, "width": size, **defaults, **given})
    options = dataclasses.replace(options, solver=solver_name(options.solver))
    check_options(model, options)
    return options


def dual_branch(model: LatentDiffusion, **given: Any) -> DualBranch:
    """Return the model's DCI settings; those given and not None come first.

    Args:
        given: fields of `DualBranch`; layers also as one name or as names with commas between them.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    settings = {**_defaults(model, DualBranch), **_said(given)}
    for name in settings:
        if name not in _DUAL:
            near = difflib.get_close_matches(name, _DUAL, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown setting '{name}' of DCI; did you mean '{near}'?")
    layers = settings.get("layers")
    if layers is not None:
        names = str(layers).split(",") if isinstance(layers, (str, int)) else layers
        settings["layers"] = tuple(str(name).strip() for name in names)
    dual = DualBranch(**settings)
    _check_types(dual)
    if not 0 <= dual.agg_time <= 1:
        raise UserError(f"agg_time {dual.agg_time}: expected 0 (plain sampling) to 1 (both branches to the end)")
    for name in ("gain", "token_sharpness", "pixel_sharpness"):
        if getattr(dual, name) < 0:
            raise UserError(f"{name} {getattr(dual, name)}: expected 0 or more")
    if dual.auxiliary_weights not in (FINETUNED, BASE):
        raise UserError(f"auxiliary_weights '{dual.auxiliary_weights}': expected {FINETUNED} or {BASE}")
    return dual


_DUAL = {field.name: field for field in dataclasses.fields(DualBranch)}


def _check_types(dual: DualBranch) -> None:
    for name, field in _DUAL.items():
        value, number = getattr(dual, name), isinstance(field.default, float)
        if number and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise UserError(f"{name} {value!r}: expected a finite number")
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise UserError(f"{name} {value!r}: expected true or false")


def finetune_config(path: str | Path, overrides: list[str] = (), name: str | None = None) -> FinetuneConfig:
    """Read a fine-tuning configuration and make its paths absolute.

    Paths in the file are relative to the file's project, paths in overrides to the current folder.
    """
    content = configuration.read_yaml(path)
    root = configuration.project_root(path)
    content.setdefault("model", FinetuneConfig.model)
    _map_paths(content, lambda key, value: anchored(value, root) if key in _WEIGHTS else str(root / value))
    # The model's checkpoint goes by this name too.
    overrides = [re.sub(r"^model\.checkpoint=", "checkpoint=", override) for override in overrides]
    mentioned = [override.partition("=")[0] for override in overrides]
    several = content.get("concepts") or any(name.startswith("concepts") for name in mentioned)
    config = configuration.build(FinetuneConfig, _with_first(content) if several else content, overrides, source=str(path))
    if config.concepts:
        config.concept.class_noun, config.data.images = config.concepts[0].class_noun, config.concepts[0].images
        if len(config.concepts) > 1 and config.validation.prompts == ValidationConfig().prompts:
            config.validation.prompts = [f"a photo of a V{i + 1}*" for i in range(len(config.concepts))]
    parts = dataclasses.asdict(config)
    _map_paths(parts, lambda key, value: value if key in _WEIGHTS and is_hub_id(value) else str(Path(value).resolve()))
    config = configuration.build(FinetuneConfig, parts)
    config.name = name or config.name
    return config


_PATHS = (("", "model"), ("", "checkpoint"), ("", "resume"), ("data", "images"), ("data", "regularization"),
          ("generate", "folder"))  # fmt: skip
"""The options of FinetuneConfig that are paths: (section, key); those of `concepts` are like data's."""

_WEIGHTS = ("model", "checkpoint")
"""Those of them that may be ids on the hub instead."""

_NO_PATHS = {"resume": AUTO, "regularization": GENERATE}


def _map_paths(content: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Change the paths in a nested mapping of FinetuneConfig's options."""
    sections = [(content.get(section) if section else content, key) for section, key in _PATHS]
    concepts = content.get("concepts")
    for concept in concepts if isinstance(concepts, list) else []:
        sections += [(concept, "images"), (concept, "regularization")]
    for holder, key in sections:
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and holder[key] != _NO_PATHS.get(key):
            holder[key] = change(key, holder[key])


def _with_first(content: dict[str, Any]) -> dict[str, Any]:
    """Fill what one concept alone would need, so that it need not be given beside a list of concepts."""
    sections = {name: dict(content.get(name) or {}) for name in ("concept", "data")}
    sections["concept"].setdefault("class_noun", "")
    sections["data"].setdefault("images", "")
    return content | sections


_AT_LEAST = {
    0: ("training.weight_decay", "training.seed", "validation.every", "validation.seed", "context.prefix_length",
        "context.suffix_length", "data.background_weight", "generate.seed"),
    1: ("training.steps", "training.batch_size", "training.micro_batch", "training.save_every", "training.checkpoint_every",
        "training.keep_last", "training.devices", "training.nodes", "validation.n_samples", "validation.steps",
        "generate.number", "generate.batch_size", "generate.steps", "logging.every"),
}  # fmt: skip
"""Options by the least value that they can have."""

_CHOICES = {
    "data.augment": ("none", "random-resize"),
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
    for name in ("learning_rate", "modifier_learning_rate", "context_learning_rate"):
        value = value_of(f"training.{name}")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"training.{name}={value}: expected a number above 0")
    for name, choices in _CHOICES.items():
        if value_of(name) not in choices:
            raise UserError(f"{name}={value_of(name)}: expected one of {', '.join(choices)}")
    lightning_name(config.training.precision)
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
    entries = subjects(config)
    names = modifier_names([len(entry.initial_words) for entry in entries])
    for tokens, entry in zip(names, entries, strict=True):
        parse_prompt("a V*", tokens, entry.class_noun)
    several = tuple(Subject(tokens, entry.class_noun) for tokens, entry in zip(names, entries, strict=True))
    for prompt in config.validation.prompts if config.validation.every else []:
        parse_prompt(prompt, names[0], entries[0].class_noun, several=several if len(entries) > 1 else ())


def _defaults(model: LatentDiffusion, schema: type) -> dict[str, Any]:
    """The entries of the model configuration's `sampling` section that belong to `schema`."""
    section = model.config.sampling
    known = {f.name for f in dataclasses.fields(SamplingOptions)} | {f.name for f in dataclasses.fields(DualBranch)}
    unknown = sorted(set(section) - known)
    if unknown:
        raise UserError(
            f"unknown key 'sampling.{unknown[0]}' in the model configuration: known are {', '.join(sorted(known))}"
        )
    own = {f.name for f in dataclasses.fields(schema)}
    return {key: value for key, value in section.items() if key in own}


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}
