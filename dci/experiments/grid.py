"""Grids of concepts, methods, seeds and sampling settings: what each of their points is made of, as data and folders."""

import dataclasses
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import MISSING

from dci.evaluation.place import Place
from dci.experiments.sampling import (
    SamplingConfig,
    anchor,
    check_auto_noun,
    check_on_model,
    check_prompts,
    check_sampling,
    contents,
    varies,
)
from dci.experiments.tasks import EvaluationConfig, ScoreTask, TrainTask, to_json
from dci.files import file_hash, read_prompts
from dci.finetuning.config import ConceptConfig, FinetuneConfig
from ldm import config as configuration
from ldm.errors import UserError
from ldm.shipped import find

T = TypeVar("T")

CELL = (sys.executable, "-m", "dci.experiments.cell")
"""Begins the command of a stage; `dci.experiments.cell` documents what follows."""


@dataclass
class GridConcept:
    """A concept to learn, or several that are learned and sampled together."""

    name: str | None = None  # null: the class noun
    class_noun: str | None = None  # with `images` the short form of a list of one
    images: str | None = None  # folder of its images; also the references that results are measured against
    concepts: list[ConceptConfig] = field(default_factory=list)
    prompts: str | None = None  # a file of its own; null: the grid's
    training: list[str] = field(default_factory=list)  # further training options, key.sub=value

    @property
    def title(self) -> str:
        """Its name, or else the class nouns."""
        return self.name or "+".join(concept.class_noun or "" for concept in self.concepts)

    @property
    def folders(self) -> list[str]:
        """The folder of each concept's images."""
        return [concept.images for concept in self.concepts if concept.images]


@dataclass
class MethodEntry:
    """A way to learn it."""

    name: str = MISSING
    config: str = MISSING  # configs/train/*.yaml
    training: list[str] = field(default_factory=list)  # further training options, key.sub=value
    vary: dict[str, Any] = field(default_factory=dict)  # training options with values: a method of each combination
    sampling: dict[str, Any] = field(default_factory=dict)  # setting's name -> this method's own options in it
    family: str | None = None  # what several variants of it are together; null: the name


@dataclass
class SettingEntry:
    """A way to sample it; options with a list of values stand for a setting of each value."""

    name: str = MISSING
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingConfig, such as agg_time: [0.2, 0.3]


@dataclass
class GridConfig:
    """Everything that a grid's results depend on; paths are relative to the configuration's project."""

    name: str = MISSING
    concepts: list[GridConcept] = field(default_factory=list)
    methods: list[MethodEntry] = MISSING
    settings: list[SettingEntry] = field(default_factory=lambda: [SettingEntry("dci")])
    seeds: list[int] = field(default_factory=lambda: [0])  # of training and of the images' noise
    prompts: str = ""  # a file with a prompt in each line; {} or V* is the concept
    n_samples: int = 4  # images of each prompt
    training: list[str] = field(default_factory=list)  # options of all trainings, key.sub=value
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingConfig for all points
    evaluation: dict[str, Any] = field(default_factory=dict)  # fields of EvaluationConfig
    device: str = "auto"
    threads: int = 1  # of each process on the CPU; rounding depends on it
    outdir: str = "outputs/sweeps"  # the grid's folder is made there; relative to the current folder


@dataclass(frozen=True)
class Training:
    """A fine-tuning run; points that differ in their sampling alone share it."""

    name: str  # concept/method/seed
    command: tuple[str, ...]  # begins the run, and goes on with it
    task: TrainTask  # what the command says
    config: FinetuneConfig  # what that comes to
    recipe: dict[str, Any]  # what its result depends on; compared as a whole
    names: tuple[Any, ...]  # what prompts call the concepts, `dci.concept.modifier_tokens.ConceptName`

    @property
    def folder(self) -> Path:
        """All that it writes is there."""
        return Path(self.task.logdir)

    @property
    def concept_file(self) -> Path:
        """The finished run's concept file; there when training is done."""
        return self.folder / "concept.safetensors"


@dataclass(frozen=True)
class GridPoint(Place):
    """One place of the grid: a training, its images and their scores."""

    training: Training
    command: tuple[str, ...]  # samples and scores
    task: ScoreTask  # what the command says
    sampling: dict[str, Any]  # fields of SamplingConfig that the setting and its lists of values give
    recipe: dict[str, Any]  # what its result depends on; compared as a whole

    @property
    def folder(self) -> Path:
        """Images are in folder/samples."""
        return Path(self.task.folder)

    @property
    def name(self) -> str:
        """concept/method/seed/setting."""
        return f"{self.training.name}/{self.setting}"

    @property
    def result(self) -> Path:
        """The scores; there when the point is done."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """The output of the point's processes."""
        return self.folder / "log.txt"


def prepare(config: GridConfig, root: Path) -> None:
    """Check a grid and make its paths absolute, those of the file relative to its project's `root`.

    Raises:
        UserError: an option that no grid could use.
    """
    config.outdir = str(Path(config.outdir).resolve())
    config.prompts = str(find(config.prompts, root))
    for concept in config.concepts:
        _prepare_concept(concept, root)
        concept.prompts = str(find(concept.prompts, root)) if concept.prompts else config.prompts
    config.methods = [each for method in config.methods for each in _variants(method)]
    for method in config.methods:
        method.config = str(find(method.config, root))
    config.sampling = anchor(config.sampling, root, "sampling")
    for entry in config.settings:
        entry.sampling = anchor(entry.sampling, root, f"sampling of '{entry.name}'")
    config.settings = [each for setting in config.settings for each in _each(setting)]
    for method in config.methods:
        named = [setting.name for setting in config.settings]
        if unknown := method.sampling.keys() - {*named}:
            raise UserError(f"methods: {method.name}: sampling of '{min(unknown)}': expected one of {', '.join(named)}")
        method.sampling = {
            name: anchor(own, root, f"methods: {method.name}: sampling of '{name}'") for name, own in method.sampling.items()
        }
    _check(config)


def grid_folder(config: GridConfig) -> Path:
    """The folder of all that a grid makes."""
    return Path(config.outdir) / config.name


def grid_points(config: GridConfig) -> list[GridPoint]:
    """Return the points of a grid, those of one training beside each other.

    Raises:
        UserError: an option of training, sampling or evaluation that no point could use.
    """
    evaluation = _checked_evaluation(config)
    points, read = [], functools.cache(_training_config)  # a file and its options are read once, not for each concept
    settings = {"": [_checked_setting(config, setting) for setting in config.settings]}
    own = {m.name: [_own(setting, m) for setting in config.settings] for m in config.methods if m.sampling}
    settings |= {name: [_checked_setting(config, setting) for setting in entries] for name, entries in own.items()}
    # Once for all seeds, and a model once for all concepts.
    check_model = functools.cache(lambda m, i, model: check_on_model(settings[m][i].options, model, settings[m][i].source))
    check_texts = functools.cache(lambda m, i, file, names: _check_texts(settings[m][i], file, names))
    for place in itertools.product(config.concepts, config.methods, config.seeds):
        training, method = _training(config, *place, read), place[1].name if place[1].sampling else ""
        for i, setting in enumerate(settings[method]):
            check_model(method, i, training.config.model)
            check_texts(method, i, place[0].prompts, training.names)
            check_auto_noun(setting.options, training.config.model, len(training.names), setting.source)
            points.append(_point(config, *place, training, setting, evaluation))
    return points


def _checked_evaluation(config: GridConfig) -> EvaluationConfig:
    """The options of scoring; what could not be scored with shows before anything is trained."""
    from dci.evaluation.evaluate import check_encoders

    options = _filled(EvaluationConfig, config.evaluation, "evaluation")
    for name, least in (("resamples", 1), ("seed", 0), ("batch_size", 1)):
        if getattr(options, name) < least:
            raise UserError(f"evaluation.{name}={getattr(options, name)}: expected {least} or more")
    if options.regularization is not None and not find(options.regularization).is_dir():
        raise UserError(f"evaluation.regularization={options.regularization}: no such folder: give real images of the class")
    try:
        check_encoders(options.clip, options.instance, options.kid)
    except UserError as error:
        raise UserError(f"evaluation: {error}") from error
    return options


def by_training(chosen: list[GridPoint]) -> list[list[GridPoint]]:
    """Return the points in groups that share a training, which one worker can work through."""
    return [list(group) for _, group in itertools.groupby(chosen, lambda point: point.training.name)]


def _prepare_concept(concept: GridConcept, root: Path) -> None:
    """Bring the short form into the list's, and the paths to the project."""
    short = concept.class_noun or concept.images
    if bool(short) == bool(concept.concepts) or (short and not (concept.class_noun and concept.images)):
        name = concept.name or concept.class_noun or concept.images
        raise UserError(f"concepts: {name}: give class_noun and images, or a list `concepts` of several, and not both")
    if short:
        concept.concepts = [ConceptConfig(class_noun=concept.class_noun, images=concept.images)]
    for number, part in enumerate(concept.concepts):
        if not part.class_noun or not part.images:
            name = concept.name or part.class_noun or part.images
            raise UserError(f"concepts: {name}: entry {number + 1} of its list needs both class_noun and images")
        part.images = str(find(part.images, root))
    concept.name = concept.title


def _training_config(file: str, options: tuple[str, ...], concepts: int) -> FinetuneConfig:
    """Read a training configuration for so many concepts, which are yet to be put in."""
    from dci.finetuning.config_files import finetune_config  # with torch, which a grid's workers need not wait for

    unnamed = [{"class_noun": "concept", "images": "."}] * concepts
    return finetune_config(file, [f"concepts={json.dumps(unnamed)}", *options])


def _training(config: GridConfig, concept: GridConcept, method: MethodEntry, seed: int, read: Callable) -> Training:
    from dci.concept.modifier_tokens import ConceptName, modifier_names
    from dci.finetuning.config import concepts_of
    from dci.finetuning.config_files import check
    from dci.finetuning.run_folder import what_a_run_keeps

    name = f"{concept.name}/{method.name}/{seed}"
    given = (*config.training, *method.training, *concept.training)
    resolved = read(method.config, given, len(concept.concepts))
    seeded = dataclasses.replace(resolved.training, seed=seed)
    resolved = dataclasses.replace(resolved, concepts=concept.concepts, training=seeded)
    check(resolved)
    parts = [{key: value for key, value in vars(part).items() if value is not None} for part in concept.concepts]
    options = [f"concepts={json.dumps(parts)}", *given, f"training.seed={seed}"]
    folder = grid_folder(config) / "trainings" / name
    task = TrainTask(method.config, tuple(options), str(folder), config.device)
    recipe = {"training": what_a_run_keeps(resolved), "threads": config.threads}
    tokens = modifier_names([len(entry.initial_words) for entry in concepts_of(resolved)])
    names = tuple(ConceptName(own, e.class_noun) for own, e in zip(tokens, concepts_of(resolved), strict=True))
    return Training(name, _command("train", task), task, resolved, recipe, names)


class _Setting(NamedTuple):
    """A way to sample, checked."""

    name: str
    given: dict[str, Any]  # the setting's own options
    options: SamplingConfig
    seeded: bool  # whether the images' seed is among them, and not the training's
    files: dict[str, str]  # what the images are made from besides the concept and its model, with digests

    @property
    def source(self) -> str:
        """What error messages call the place where the setting's options were given."""
        return f"sampling of '{self.name}'"


def _checked_setting(config: GridConfig, setting: SettingEntry) -> _Setting:
    given = {"n_samples": config.n_samples, **config.sampling, **setting.sampling}
    options = _filled(SamplingConfig, given, f"sampling of '{setting.name}'")
    found = _Setting(setting.name, setting.sampling, options, "seed" in given, {})
    check_sampling(options, found.source)
    return found._replace(files=contents(options))


def _check_texts(setting: _Setting, file: str, names: tuple[Any, ...]) -> None:
    check_prompts(setting.options, read_prompts(file), names, setting.source)


def _point(
    config: GridConfig,
    concept: GridConcept,
    method: MethodEntry,
    seed: int,
    training: Training,
    setting: "_Setting",
    evaluation: EvaluationConfig,
) -> GridPoint:
    folder = grid_folder(config) / "cells" / training.name / setting.name
    sampling = setting.options if setting.seeded else dataclasses.replace(setting.options, seed=seed)
    prompts = concept.prompts or config.prompts
    place = Place(concept.title, method.name, seed, setting.name)
    task = ScoreTask(
        place,
        str(training.concept_file),
        prompts,
        sampling,
        tuple(concept.folders),
        evaluation,
        str(folder),
        config.device,
    )
    recipe = training.recipe | {"sampling": sampling, "prompts": file_hash(prompts), "evaluation": evaluation}
    if setting.files:
        recipe["files"] = setting.files
    return GridPoint(
        **vars(place),
        training=training,
        command=_command("score", task),
        task=task,
        sampling={name: getattr(sampling, name) for name in setting.given},
        recipe=recipe,
    )


def _command(stage: str, task: TrainTask | ScoreTask) -> tuple[str, ...]:
    return (*CELL, stage, to_json(task))


def _filled(schema: type[T], options: dict[str, Any], source: str) -> T:
    known = {name.replace("-", "_"): value for name, value in options.items()}
    known = {"scaled_text_score" if name == "clip_t_w2.5" else name: value for name, value in known.items()}
    return configuration.build(schema, known, source=source)


def _each(setting: SettingEntry) -> list[SettingEntry]:
    """A setting for each combination of the values that are lists, named after them."""
    lists = {key: value for key, value in setting.sampling.items() if varies(key, value)}
    settings = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = "-".join([setting.name, *(f"{key}={value}" for key, value in chosen.items())])
        settings.append(SettingEntry(name, {**setting.sampling, **chosen}))
    return settings


def _variants(method: MethodEntry) -> list[MethodEntry]:
    """A method for each combination of the values to vary, named after them; the method itself where there are none."""
    method.family = method.family or method.name
    if not all(isinstance(values, list) and values for values in method.vary.values()):
        raise UserError(f"methods: {method.name}: vary has an option without values: give a list of one or more")
    variants = []
    for values in itertools.product(*method.vary.values()):
        chosen = dict(zip(method.vary, values, strict=True))
        name = "-".join([method.name, *(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())])
        options = [*method.training, *(f"{key}={value}" for key, value in chosen.items())]
        variants.append(dataclasses.replace(method, name=name, training=options, vary={}))
    return variants


def _own(setting: SettingEntry, method: MethodEntry) -> SettingEntry:
    """A setting with what a method says of it."""
    own = method.sampling.get(setting.name)
    return dataclasses.replace(setting, sampling={**setting.sampling, **own}) if own else setting


def check_folder_name(kind: str, name: str) -> None:
    """Raise UserError for a name that could not be a folder's, or would lead out of the grid's."""
    if not re.fullmatch(r"[\w.+=,-]+", name) or name.startswith("."):
        raise UserError(f"{kind}: '{name}' names a folder: use letters, digits and any of . _ + = , -")


def _check(config: GridConfig) -> None:
    """Raise UserError for what would make folders overlap, or a point fail after long work."""
    check_folder_name("name", config.name)
    for kind in ("concepts", "methods", "settings", "seeds"):
        names = [str(entry) if kind == "seeds" else entry.name for entry in getattr(config, kind)]
        if not names:
            raise UserError(f"{config.name}: {kind} is empty: a grid needs at least one of them")
        for name in names:
            check_folder_name(kind, name)
            if names.count(name) > 1:
                raise UserError(f"{kind}: '{name}' is there twice: give each a name of its own")
    if negative := [seed for seed in config.seeds if seed < 0]:
        raise UserError(f"seeds: {negative[0]}: expected whole numbers from 0 on; results are kept apart by them")
    for least, name in ((1, "n_samples"), (1, "threads")):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)}: expected {least} or more")
    for concept in config.concepts:
        for folder in concept.folders:
            if not Path(folder).is_dir():
                raise UserError(f"concepts: {concept.name}: no folder {folder}: give the folder of its images")
    files = {concept.prompts or config.prompts for concept in config.concepts}
    for file in files | {method.config for method in config.methods}:
        if not Path(file).is_file():
            raise UserError(f"{config.name}: no file {file}: give a file of prompts, or a training configuration")
