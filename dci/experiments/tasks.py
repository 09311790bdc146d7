"""The task of a grid's process, as JSON on its command line."""

import json
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from dci.evaluation.place import Place
from dci.experiments.sampling import SamplingConfig
from ldm.errors import UserError
from ldm.facts import read_fact


@dataclass
class EvaluationConfig:
    """How a point's images are scored: the options of evaluate.py."""

    clip: str = "tiny"
    instance: str = "tiny"
    kid: str | None = None
    regularization: str | None = None  # folder of real images of the class, for KID
    class_noun: list[str] = field(default_factory=list)
    scaled_text_score: bool = False  # Custom Diffusion's, 2.5 max(cos, 0); also called clip_t_w2.5
    object_only: bool = False  # CLIP-I and DINO-I see what the masks beside the references mark
    resamples: int = 9999
    seed: int = 0
    batch_size: int = 32
    offline: bool = False


@dataclass(frozen=True)
class TrainTask:
    """A training to make, or to go on with."""

    config: str  # configs/train/*.yaml
    options: tuple[str, ...]  # key.sub=value
    logdir: str  # the concept file is put there
    device: str


@dataclass(frozen=True)
class ScoreTask:
    """A point's images to sample and to score."""

    place: Place
    concept: str  # the concept file
    prompts: str  # file with a prompt in each line
    sampling: SamplingConfig
    references: tuple[str, ...]  # folders of the concepts' images
    evaluation: EvaluationConfig
    folder: str  # images go into folder/samples
    device: str


T = TypeVar("T", TrainTask, ScoreTask)


def to_json(task: TrainTask | ScoreTask) -> str:
    """Return a task as an argument of its process."""
    return json.dumps(asdict(task))


def from_json(kind: type[T], text: str) -> T:
    """Return the task that an argument holds.

    Raises:
        UserError: it is no JSON, or a field is missing or of another type.
    """
    try:
        return read_fact(kind, json.loads(text), "the task")
    except ValueError as error:
        raise UserError(f"the task is not readable as JSON ({error})") from error
