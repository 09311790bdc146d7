"""The metadata of images: what they were made with, and everything that is needed to make them again.

Files may change under their names, so the hashes of their contents belong to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dci.files import content_hash, file_hash
from dci.version import __version__

if TYPE_CHECKING:
    from ldm.text_to_image import SamplingOptions

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of precisions, and of torch's types."""


class LeftOut(Enum):
    """Marks a field that a record omits; None is recorded, and means that there was none."""

    LEFT_OUT = "left out"


LEFT_OUT = LeftOut.LEFT_OUT


@dataclass(frozen=True)
class PromptMetadata:
    """A prompt as it was given, and as the branches read it."""

    prompt: str
    concept_prompt: str | LeftOut = LEFT_OUT
    auxiliary_prompt: str | LeftOut = LEFT_OUT

    def to_json(self) -> dict[str, Any]:
        """Return the prompt's fields of an image's record."""
        return {name: value for name, value in vars(self).items() if value is not LEFT_OUT}


@dataclass(frozen=True, kw_only=True)
class SamplingMetadata:
    """What images were made with besides their prompts and numbers, under the names that it has in their record."""

    concept: str | LeftOut = LEFT_OUT
    concept_hash: str | LeftOut = LEFT_OUT
    concept_files: Mapping[str, str] | LeftOut = LEFT_OUT  # of several files, with hashes
    class_noun: str | LeftOut = LEFT_OUT  # as it was given for another program's file; so is the trigger
    trigger: str | LeftOut = LEFT_OUT
    strength_concept: float | LeftOut = LEFT_OUT
    loras: Mapping[str, str] | LeftOut = LEFT_OUT  # FILE:0.8, with hashes
    version: str | LeftOut = LEFT_OUT  # of this package
    negative_prompt: str | LeftOut = LEFT_OUT
    model: str | LeftOut = LEFT_OUT
    checkpoint: str | None | LeftOut = LEFT_OUT
    model_hash: str | LeftOut = LEFT_OUT  # fingerprint of the weights
    model_config_hash: str | None | LeftOut = LEFT_OUT
    ema: bool | LeftOut = LEFT_OUT
    vae: str | LeftOut = LEFT_OUT
    vae_hash: str | LeftOut = LEFT_OUT
    clip_skip: int | None | LeftOut = LEFT_OUT
    precision: str | LeftOut = LEFT_OUT
    init_image: str | None | LeftOut = LEFT_OUT
    init_image_hash: str | None | LeftOut = LEFT_OUT
    mask: str | None | LeftOut = LEFT_OUT
    mask_hash: str | None | LeftOut = LEFT_OUT
    strength: float | None | LeftOut = LEFT_OUT
    options: "SamplingOptions"
    dci: Any = LEFT_OUT  # `dci.dual_branch.integration.DualBranch`; None: sampled plainly

    def to_json(self) -> dict[str, Any]:
        """Return the fields that all these images' records share."""
        record: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "options":
                record |= self.options.metadata()
            elif value is not LEFT_OUT:
                record[name] = asdict(value) if name == "dci" and value else value
        return record


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


def sampling_metadata(
    base: LoadedModel,
    prepared: Any,
    init_image: str | None = None,
    mask: str | None = None,
    loras: Mapping[str, str] | None = None,
) -> SamplingMetadata:
    """Return the metadata that identify the base model and the sampler's options.

    Args:
        prepared: the request, as `dci.pipeline` prepares it.
        init_image, mask: files that sampling started from.
        loras: on the base model, with their files' hashes.
    """
    return SamplingMetadata(
        loras=loras or LEFT_OUT,
        negative_prompt=prepared.request.negative,
        model=base.model,
        checkpoint=base.checkpoint,
        model_hash=base.fingerprint,
        model_config_hash=file_hash(base.model) if Path(base.model).suffix in (".yaml", ".yml") else None,
        ema=base.ema,
        vae=base.vae or LEFT_OUT,
        vae_hash=content_hash(base.vae) if base.vae else LEFT_OUT,
        clip_skip=base.clip_skip,
        precision=base.precision,
        init_image=init_image,
        init_image_hash=init_image and file_hash(init_image),
        mask=mask,
        mask_hash=mask and file_hash(mask),
        strength=prepared.init and prepared.init.strength,
        options=prepared.options,
    )


def with_concept(
    metadata: SamplingMetadata,
    prepared: Any,
    files: Sequence[str],
    strength: float = 1.0,
    class_noun: str | None = None,
    trigger: str | None = None,
) -> SamplingMetadata:
    """Add the metadata that identify the concept, in one or several files, its strength and DCI's settings."""
    return replace(
        metadata,
        concept=files[0],
        concept_hash=content_hash(files[0]),
        concept_files={file: content_hash(file) for file in files} if len(files) > 1 else LEFT_OUT,
        class_noun=class_noun or LEFT_OUT,
        trigger=trigger or LEFT_OUT,
        strength_concept=LEFT_OUT if strength == 1 else strength,
        version=__version__,
        dci=prepared.dual,
    )


def prompt_metadata(prepared: Any) -> list[PromptMetadata]:
    """Return the metadata of each prompt: as it was given, and as both branches read it."""
    read = zip(prepared.request.prompts, prepared.prompts, strict=True)
    return [PromptMetadata(text, prompt.concept, prompt.auxiliary) for text, prompt in read]
