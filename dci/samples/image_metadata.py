"""What images were made with, as their metadata tell it, and everything that is needed to make them again.

Files may change under their names, so the hashes of their contents belong to it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dci.files import content_hash, file_hash
from dci.version import __version__

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of precisions, and of torch's types."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model as it was loaded."""

    model: str  # YAML, weights' file, diffusers folder or hub id
    checkpoint: str | None  # weights in place of the model's own
    fingerprint: str
    precision: str  # of the networks, one of PRECISIONS
    ema: bool = False
    clip_skip: int | None = None
    vae: str | None = None  # an autoencoder in place of the model's own


def precision_name(dtype: Any) -> str:
    """torch.float32 -> "fp32", and so on."""
    return next(name for name, known in PRECISIONS.items() if str(dtype) == f"torch.{known}")


def concept_metadata(
    files: Sequence[str], strength: float = 1.0, class_noun: str | None = None, trigger: str | None = None
) -> dict:
    """Return what tells a concept, one or several files, and its strength."""
    metadata: dict[str, Any] = {"concept": files[0], "concept_hash": content_hash(files[0])}
    if len(files) > 1:
        metadata |= {"concept_files": {file: content_hash(file) for file in files}}
    metadata |= {name: value for name, value in (("class_noun", class_noun), ("trigger", trigger)) if value}
    return metadata | ({"strength_concept": strength} if strength != 1 else {})


def sampling_metadata(base: LoadedModel, prepared: Any, init_image: str | None = None, mask: str | None = None) -> dict:
    """Return what tells the base model and the sampler's options.

    Args:
        prepared: the request, as `dci.pipeline` prepares it.
        init_image, mask: files that sampling started from.
    """
    return {
        "negative_prompt": prepared.request.negative,
        "model": base.model,
        "checkpoint": base.checkpoint,
        "model_hash": base.fingerprint,
        "model_config_hash": file_hash(base.model) if Path(base.model).suffix in (".yaml", ".yml") else None,
        "ema": base.ema,
        **({"vae": base.vae, "vae_hash": content_hash(base.vae)} if base.vae else {}),
        "clip_skip": base.clip_skip,
        "precision": base.precision,
        "init_image": init_image,
        "init_image_hash": init_image and file_hash(init_image),
        "mask": mask,
        "mask_hash": mask and file_hash(mask),
        "strength": prepared.init and prepared.init.strength,
        **prepared.options.metadata(),
    }


def with_concept(concept: dict, sampling: dict, prepared: Any) -> dict:
    """Put a concept's metadata, a sampler's and DCI's together."""
    return {**concept, "version": __version__, **sampling, "dci": prepared.dual and dataclasses.asdict(prepared.dual)}


def prompt_metadata(prepared: Any) -> list[dict]:
    """Return what tells each prompt of a concept: as it was given, and as the branches read it."""
    read = zip(prepared.request.prompts, prepared.prompts, strict=True)
    return [{"prompt": text, "concept_prompt": p.concept, "auxiliary_prompt": p.auxiliary} for text, p in read]
