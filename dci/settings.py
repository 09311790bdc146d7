"""Settings: what the files say, and what the user says in place of them."""

import dataclasses
from pathlib import Path
from typing import Any

from dci.config import FinetuneConfig
from dci.integration import DualBranch
from ldm import config as configuration
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.sampling import SamplingOptions, check_options


def sampling_options(model: LatentDiffusion, **given: Any) -> SamplingOptions:
    """Return the model's sampling options; those given and not None come first.

    Raises:
        UserError: a value that the model cannot be sampled with.
    """
    defaults = _defaults(model, SamplingOptions)
    size = model.config.image_size
    options = SamplingOptions(**{"height": size, "width": size, **defaults, **_said(given)})
    check_options(model, options)
    return options


def dual_branch(model: LatentDiffusion, **given: Any) -> DualBranch:
    """Return the model's DCI settings; those given and not None come first.

    Raises:
        UserError: a value out of range.
    """
    dual = DualBranch(**{**_defaults(model, DualBranch), **_said(given)})
    if not 0 <= dual.agg_time <= 1:
        raise UserError(f"agg_time {dual.agg_time}: expected 0 (plain sampling) to 1 (both branches to the end)")
    if dual.gain < 0:
        raise UserError(f"gain {dual.gain}: expected 0 or more")
    return dual


def finetune_config(path: str | Path, overrides: list[str] = (), name: str | None = None) -> FinetuneConfig:
    """Read a fine-tuning configuration and make its paths absolute.

    Paths in the file are relative to the file's project, paths in overrides to the current folder.
    """
    content = configuration.read_yaml(path)
    root = configuration.project_root(path)
    content.setdefault("model", FinetuneConfig.model)
    for section, key in _PATHS:
        holder = content.get(section, {}) if section else content
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = str(root / holder[key])
    config = configuration.build(FinetuneConfig, content, overrides, source=str(path))
    for section, key in _PATHS:
        holder = getattr(config, section) if section else config
        value = getattr(holder, key)
        setattr(holder, key, None if value is None else str(Path(value).resolve()))
    config.name = name or config.name
    return config


_PATHS = (("", "model"), ("", "checkpoint"), ("data", "images"), ("data", "regularization"))
"""The options of FinetuneConfig that are paths: (section, key)."""


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
