"""Grids of concepts, methods, seeds and sampling settings: what is to be run, as command lines and files."""

import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from dci.files import file_hash
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "scripts"
"""The folder of train_ico.py, sample_dci.py and evaluate.py."""


@dataclass
class PartEntry:
    """One of several concepts that are learned together."""

    class_noun: str = MISSING
    images: str = MISSING
    regularization: str | None = None


@dataclass
class ConceptEntry:
    """A concept to learn, or several that are learned and drawn together."""

    class_noun: str = MISSING
    images: str = MISSING  # folder of its pictures; also the references that results are measured against
    name: str | None = None  # null: the class noun
    prompts: str | None = None  # a file of its own; null: the grid's
    training: list[str] = field(default_factory=list)  # further training options, key.sub=value
    parts: list[PartEntry] = field(default_factory=list)  # several concepts, in place of class_noun and images

    @property
    def folders(self) -> list[str]:
        """The folder of each concept's pictures."""
        return [part.images for part in self.parts] or [self.images]


@dataclass
class MethodEntry:
    """A way to learn it."""

    name: str = MISSING
    config: str = MISSING  # configs/train/*.yaml
    training: list[str] = field(default_factory=list)  # further training options, key.sub=value


@dataclass
class SettingEntry:
    """A way to draw it; options with a list of values stand for a setting of each value."""

    name: str = MISSING
    sampling: dict[str, Any] = field(default_factory=dict)  # options of sample_dci.py, such as agg_time: [0.2, 0.3]


@dataclass
class GridConfig:
    """Everything that the cells of a grid depend on; paths are relative to the configuration's project."""

    name: str = MISSING
    concepts: list[ConceptEntry] = MISSING
    methods: list[MethodEntry] = MISSING
    settings: list[SettingEntry] = field(default_factory=lambda: [SettingEntry("dci")])
    seeds: list[int] = field(default_factory=lambda: [0])  # of training and of the pictures' noise
    prompts: str = MISSING  # a file with a prompt in each line; {} or V* is the concept
    n_samples: int = 4  # pictures of each prompt
    training: list[str] = field(default_factory=list)  # options of all trainings, key.sub=value
    sampling: dict[str, Any] = field(default_factory=dict)  # options of sample_dci.py for all cells
    evaluation: dict[str, Any] = field(default_factory=dict)  # options of evaluate.py
    device: str = "auto"  # of all programs
    threads: int = 1  # of each program on the CPU; rounding depends on it
    outdir: str = "outputs/sweeps"  # the grid's folder is made there; relative to the current folder


@dataclass(frozen=True)
class Training:
    """A fine-tuning run; cells that differ in their sampling alone share it."""

    name: str  # concept/method/seed
    folder: Path
    command: tuple[str, ...]  # begins the run, and goes on with it
    recipe: dict[str, Any]  # what its result depends on

    @property
    def concept_file(self) -> Path:
        """A link to the finished run's concept file; there when training is done."""
        return self.folder / "concept.safetensors"


@dataclass(frozen=True)
class Cell:
    """One place of the grid: a training, its pictures and their scores."""

    concept: str
    method: str
    seed: int
    setting: str
    training: Training
    folder: Path
    sampling: tuple[str, ...]  # command; its pictures are in folder/samples
    evaluation: tuple[str, ...]  # command; what it writes is in folder/evaluation
    recipe: dict[str, Any]  # what its result depends on
    references: tuple[str, ...]  # folders of the concepts' pictures

    @property
    def name(self) -> str:
        """concept/method/seed/setting."""
        return f"{self.training.name}/{self.setting}"

    @property
    def result(self) -> Path:
        """The scores; there when the cell is done."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """What the cell's programs said."""
        return self.folder / "log.txt"


def prepare(config: GridConfig, root: Path) -> None:
    """Check a grid and make its paths absolute, those of the file relative to its project's `root`.

    Raises:
        UserError: an option that no grid could use.
    """
    config.outdir = str(Path(config.outdir).resolve())
    config.prompts = str(root / config.prompts)
    for concept in config.concepts:
        concept.name = concept.name or concept.class_noun
        for part in concept.parts or [concept]:
            part.images = str(root / part.images)
        concept.prompts = str(root / concept.prompts) if concept.prompts else config.prompts
    for method in config.methods:
        method.config = str(root / method.config)
    config.settings = [each for setting in config.settings for each in _each(setting)]
    _check(config)


def grid_folder(config: GridConfig) -> Path:
    """The folder of all that a grid makes."""
    return Path(config.outdir) / config.name


def cells(config: GridConfig) -> list[Cell]:
    """Return the cells of a grid, those of one training beside each other."""
    trainings = itertools.product(config.concepts, config.methods, config.seeds)
    return [_cell(config, *place, setting) for place in trainings for setting in config.settings]


def by_training(chosen: list[Cell]) -> list[list[Cell]]:
    """Return the cells in groups that share a training, which one process can work through."""
    return [list(group) for _, group in itertools.groupby(chosen, lambda cell: cell.training.name)]


def _training(config: GridConfig, concept: ConceptEntry, method: MethodEntry, seed: int) -> Training:
    name = f"{concept.name}/{method.name}/{seed}"
    options = [*_what(concept), *config.training, *method.training, *concept.training, f"training.seed={seed}"]
    folder = grid_folder(config) / "trainings" / name
    command = _command("train_ico.py", {"config": method.config, "logdir": folder, "device": config.device})
    recipe = {"config": method.config, "options": options, "threads": config.threads}
    return Training(name, folder, (*command, "resume=auto", *options), recipe)


def _what(concept: ConceptEntry) -> list[str]:
    """Training options that say what is learned."""
    if not concept.parts:
        return [f"concept.class_noun={concept.class_noun}", f"data.images={concept.images}"]
    parts = [{key: value for key, value in vars(part).items() if value is not None} for part in concept.parts]
    return [f"concepts={json.dumps(parts)}"]


def _cell(config: GridConfig, concept: ConceptEntry, method: MethodEntry, seed: int, setting: SettingEntry) -> Cell:
    training = _training(config, concept, method, seed)
    folder = grid_folder(config) / "cells" / training.name / setting.name
    drawing = {"from_file": concept.prompts, "n_samples": config.n_samples, "seed": seed}
    drawing |= config.sampling | setting.sampling
    places = {"concept": training.concept_file, "outdir": folder, "device": config.device}
    measuring = {"samples": folder, "references": concept.folders, "out": folder / "evaluation", **config.evaluation}
    return Cell(
        concept=concept.name,
        method=method.name,
        seed=seed,
        setting=setting.name,
        training=training,
        folder=folder,
        sampling=_command("sample_dci.py", places | drawing),
        evaluation=_command("evaluate.py", measuring | {"device": config.device}),
        recipe={"training": training.recipe, "sampling": drawing, "prompts": file_hash(concept.prompts),
                "evaluation": config.evaluation},  # fmt: skip
        references=tuple(concept.folders),
    )


def _command(program: str, options: dict[str, Any]) -> tuple[str, ...]:
    """A program's command line; True is a switch, False and None leave an option out, a list is several values."""
    command = [sys.executable, str(PROGRAMS / program)]
    for name, value in options.items():
        if value is None or value is False:
            continue
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command += map(str, value) if isinstance(value, list) else [str(value)]
    return tuple(command)


def _each(setting: SettingEntry) -> list[SettingEntry]:
    """A setting for each combination of the values that are lists, named after them."""
    lists = {key: value for key, value in setting.sampling.items() if isinstance(value, list)}
    settings = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = "-".join([setting.name, *(f"{key}={value}" for key, value in chosen.items())])
        settings.append(SettingEntry(name, {**setting.sampling, **chosen}))
    return settings


def _check(config: GridConfig) -> None:
    """Raise UserError for what would make folders overlap, or a cell fail after long work."""
    for kind in ("concepts", "methods", "settings", "seeds"):
        names = [str(entry) if kind == "seeds" else entry.name for entry in getattr(config, kind)]
        if not names:
            raise UserError(f"{config.name}: {kind} is empty: a grid needs at least one of them")
        for name in names:
            if not re.fullmatch(r"[\w.+=,-]+", name) or name.startswith("."):
                raise UserError(f"{kind}: '{name}' names a folder: use letters, digits and any of . _ + = , -")
            if names.count(name) > 1:
                raise UserError(f"{kind}: '{name}' is there twice: give each a name of its own")
    for least, name in ((1, "n_samples"), (1, "threads")):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)}: expected {least} or more")
    for concept in config.concepts:
        for folder in concept.folders:
            if not Path(folder).is_dir():
                raise UserError(f"concepts: {concept.name}: no folder {folder}: give the folder of its pictures")
    for file in {concept.prompts for concept in config.concepts} | {method.config for method in config.methods}:
        if not Path(file).is_file():
            raise UserError(f"{config.name}: no file {file}: give a file of prompts, or a training configuration")
