"""Evaluation suites: grids whose concepts and prompts may come from one of the field's data sets."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dci.experiments.datasets import DatasetConcept, read_customconcept101, read_dreambench, read_dreambench_plus
from dci.experiments.grid import GridConcept, GridConfig, check_folder_name, grid_folder, prepare
from dci.files import read_prompts, write_atomically
from dci.finetuning.config import ConceptConfig
from ldm import config as configuration
from ldm import extras
from ldm.errors import UserError
from ldm.shipped import find

_READERS = {
    "dreambench": read_dreambench,
    "dreambench-plus": read_dreambench_plus,
    "customconcept101": read_customconcept101,
    "customconcept101-pairs": lambda folder: read_customconcept101(folder, pairs=True),
}


T = TypeVar("T", GridConcept, DatasetConcept)


@dataclass
class DatasetConfig:
    """Where concepts and prompts come from in place of lists, and which of them to take, of lists as well."""

    kind: str | None = None  # null: the lists; dreambench, dreambench-plus, customconcept101, customconcept101-pairs
    folder: str | None = None  # its folder, as published; relative to the current folder
    subjects: list[str] = field(default_factory=list)  # names of those to take; empty: all
    first: int | None = None  # take so many at most
    prompts: int | None = None  # take the first so many prompts of each; null: all


LOCAL, SLURM = "local", "slurm"


@dataclass
class SuiteConfig(GridConfig):
    """A grid, where its concepts and prompts come from, who works on it, and how it is reported.

    The first method and setting are the baseline of the report's comparisons.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    title: str = ""
    notes: list[str] = field(default_factory=list)  # paragraphs of the report
    cluster: str = LOCAL  # local: processes on this machine; slurm: jobs in its queue
    workers: int | None = None  # local: processes at a time; null: one for each GPU, without any one for each core
    slurm: dict[str, Any] = field(default_factory=dict)  # a job's resources in place of the defaults


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite's configuration; a data set's prompts are written into the suite's folder.

    Raises:
        UserError: options that cannot be used, a data set that is not there or not of its layout.
    """
    config = configuration.load(SuiteConfig, path, overrides)
    check_folder_name("name", config.name)  # before a data set's prompts are written there
    if config.cluster not in (LOCAL, SLURM):
        raise UserError(f"cluster={config.cluster}: expected {LOCAL} or {SLURM}")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers={config.workers}: expected 1 or more")
    _check_resources(config)
    config.title = config.title or config.name
    config.outdir = str(Path(config.outdir).resolve())
    if config.dataset.kind is not None:
        config.concepts = [_entry(config, subject) for subject in _subjects(config)]
    elif not config.concepts or not (config.prompts or all(concept.prompts for concept in config.concepts)):
        raise UserError(f"{path} names neither concepts and prompts nor a data set: give both, or dataset.kind and .folder")
    prepare(config, configuration.project_root(path))
    if config.dataset.kind is None:
        _take_listed(config)
    return config


def _check_resources(config: SuiteConfig) -> None:
    """Raise UserError for resources of a job that submitit does not know, and where it is needed and missing."""
    if extras.is_missing("submitit"):
        if config.cluster == SLURM:
            raise UserError(extras.how_to_install("submitit"))
        return
    if config.slurm:
        from submitit import SlurmExecutor

        known = sorted(SlurmExecutor._valid_parameters())
        for name in config.slurm:
            if name not in known:
                raise UserError(
                    f"slurm.{name}: expected one of {', '.join(known)}; sbatch's other options go into "
                    "slurm.additional_parameters"
                )


def _subjects(config: SuiteConfig) -> list[DatasetConcept]:
    dataset = config.dataset
    _check_part(dataset)
    if config.concepts:
        raise UserError("concepts and dataset.kind are both given: leave one of them out")
    if dataset.kind not in _READERS:
        raise UserError(f"dataset.kind={dataset.kind}: expected one of {', '.join(_READERS)}")
    if dataset.folder is None:
        raise UserError(f"{config.name} needs the data set's folder: add dataset.folder=FOLDER")
    subjects = _READERS[dataset.kind](find(dataset.folder).resolve())
    chosen = _named(dataset, subjects, dataset.folder)
    return [dataclasses.replace(s, prompts=s.prompts[: dataset.prompts]) for s in chosen]


def _check_part(dataset: DatasetConfig) -> None:
    for name in ("first", "prompts"):
        value = getattr(dataset, name)
        if value is not None and value < 1:
            raise UserError(f"dataset.{name}={value}: expected 1 or more, or null for all")


def _named(dataset: DatasetConfig, entries: list[T], source: str | Path) -> list[T]:
    """The entries to take of all, which have names."""
    known = [entry.name for entry in entries if entry.name]
    for name in dataset.subjects:
        if name not in known:
            raise UserError(f"dataset.subjects: no '{name}' in {source}: it has {', '.join(known)}")
    chosen = [entry for entry in entries if not dataset.subjects or entry.name in dataset.subjects]
    return chosen[: dataset.first]


def _take_listed(config: SuiteConfig) -> None:
    """Leave the concepts and prompts that are to be taken of a suite's lists; prompts go into a file of their own."""
    dataset = config.dataset
    _check_part(dataset)
    config.concepts = _named(dataset, config.concepts, "the suite's list")
    for concept in config.concepts if dataset.prompts else []:
        source = Path(concept.prompts or config.prompts)
        prompts = read_prompts(source)[: dataset.prompts]
        concept.prompts = str(_prompt_file(config, f"first-{len(prompts)}-of-{source.stem}", prompts))


def _entry(config: SuiteConfig, subject: DatasetConcept) -> GridConcept:
    """A grid's entry for a subject; its prompts go into a file."""
    file = _prompt_file(config, subject.name, subject.prompts)
    parts = [
        ConceptConfig(noun, None, str(_folder(config, images)), str(regularization) if regularization else None)
        for noun, images, regularization in zip(subject.class_nouns, subject.images, subject.regularization, strict=True)
    ]
    return GridConcept(name=subject.name, concepts=parts, prompts=str(file))


def _folder(config: SuiteConfig, images: Path) -> Path:
    """A concept's folder of images; a single image of a data set is copied into one of its own."""
    if not images.is_file():
        return images
    copy = grid_folder(config) / "references" / f"{images.parent.name}-{images.stem}" / images.name
    if not copy.is_file() or copy.stat().st_size != images.stat().st_size:
        write_atomically(copy, images.read_bytes())
    return copy.parent


def _prompt_file(config: SuiteConfig, name: str, prompts: Sequence[str]) -> Path:
    """Write prompts into the suite's folder, one in each line, where they are not there already."""
    file = grid_folder(config) / "prompts" / f"{name}.txt"
    content = "".join(f"{prompt}\n" for prompt in prompts).encode()
    if not file.is_file() or file.read_bytes() != content:
        write_atomically(file, content)  # programs of the suite may be reading it
    return file
