"""Scores of generated images, their means with intervals, and the difference between two runs."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dci.evaluation.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap_mean, factors
from dci.evaluation.metrics import KID
from dci.evaluation.scoring_metadata import BootstrapMetadata, ScoringMetadata
from dci.files import write_atomically
from ldm.errors import UserError
from ldm.facts import read_fact

REPORT = "scores.json"
"""A report's file of all its runs, beside its page."""


@dataclass(frozen=True)
class ImageScore:
    """A generated image, what it was generated from, and its scores."""

    file: str
    prompt: str  # as it was asked for; one level of the factor "prompt"
    text: str  # what CLIP-T compares the image with: the prompt without modifier tokens
    noise: str  # what the initial noise depends on, "seed:index"; "" where it was not recorded
    values: dict[str, float]  # metric -> score; a metric that does not apply to the image is left out
    concept: str = ""  # where several concepts are pooled


@dataclass(frozen=True)
class Scores:
    """The scores that `evaluate_folder` returns."""

    rows: tuple[ImageScore, ...]
    summary: dict[str, Interval]  # metric -> mean over the rows, KID over the folder
    metadata: ScoringMetadata = ScoringMetadata()

    def save(self, file: str | Path) -> None:
        """Write JSON, whole or not at all."""
        write_atomically(file, (json.dumps(as_json(self), indent=1) + "\n").encode())

    @staticmethod
    def load(file: str | Path) -> "Scores":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        try:
            return scores_of(json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{file} holds no scores of a folder ({error}): delete it, and evaluate again") from error


def scores_of(content: Any) -> Scores:
    """Read scores that `as_json` wrote, from an object that may hold more.

    Raises:
        UserError: something is missing or of another type.
    """
    if isinstance(content, dict):
        metadata = content.get("metadata", content.get("facts"))  # version 0.1 said facts, and counted pictures
        if isinstance(metadata, dict) and "pictures" in metadata:
            metadata = {("images" if name == "pictures" else name): value for name, value in metadata.items()}
        content = content | {"metadata": metadata}
    return read_fact(Scores, content)


@dataclass(frozen=True)
class RunScores:
    """Scores under the name of a table's row."""

    name: str
    scores: Scores
    series: str = ""  # runs that differ in a parameter only, as one method with several T_a; "": each its own


def read_report(file: str | Path) -> list[RunScores]:
    """Read the runs of a report's `scores.json`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    file = Path(file)
    file = file / REPORT if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no file {file}: give a report's folder, or the {REPORT} that it has beside its page")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [RunScores(run["name"], scores_of(run), run["series"]) for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{file} holds no scores of a report: give the {REPORT} that a report has beside its page"
        ) from error


def read_reports(files: Sequence[str | Path]) -> dict[str, Scores]:
    """Return the runs of reports by name; one that several reports have is of all their concepts.

    Raises:
        UserError: as `read_report`, or two reports have the same run of the same concept.
    """
    found: dict[str, Scores] = {}
    for file in files:
        for run in read_report(file):
            rows = run.scores.rows
            if known := found.get(run.name):
                if both := {row.concept for row in known.rows} & {row.concept for row in rows}:
                    of = f" of '{min(both)}'" if any(both) else ""
                    raise UserError(f"{file} has a row '{run.name}'{of}, as another of these reports has: give one of them")
                rows = known.rows + rows
            found[run.name] = Scores(rows, summarize(rows)) if known else run.scores
    return found


def columns(rows: Sequence[ImageScore]) -> dict[str, list[str]]:
    """Return the factors that the rows belong to, for `dci.evaluation.bootstrap`; unknown noise is a level of its own."""
    return {
        "concept": [row.concept for row in rows],
        "prompt": [row.prompt for row in rows],
        "seed": [row.noise or f"?{i}" for i, row in enumerate(rows)],
    }


def summarize(rows: Sequence[ImageScore], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Return each metric's mean over the rows that have it, with its bootstrap interval over prompts and seeds."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    summary = {}
    for name in names:
        having = [row for row in rows if name in row.values]
        summary[name] = bootstrap_mean([row.values[name] for row in having], columns(having), resamples, seed)
    return summary


def difference(a: Scores, b: Scores, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> dict[str, Interval]:
    """Return each metric's mean of a - b over the images of the same concept, prompt and seed, with its interval.

    An interval above zero says that `a` is better; pairing takes out what prompts and seeds do to both.
    Where no noise is written down, the images of a prompt are paired in their order. KID, which has no
    value of single images, is not compared.

    Raises:
        UserError: the two have no such images in common.
    """
    result = {}
    for name, found in paired_differences(a, b).items():
        rows, differences = zip(*found, strict=True)
        result[name] = bootstrap_mean(differences, columns(rows), resamples, seed, level)
    return result


def paired_differences(a: Scores, b: Scores) -> dict[str, list[tuple[ImageScore, float]]]:
    """Return, for each metric that both have, a's images with a partner in b, and the differences a - b.

    Raises:
        UserError: the two have no image of the same concept, prompt and seed in common.
    """
    ours, theirs = _keyed(a.rows), _keyed(b.rows)
    keys = [key for key in ours if key in theirs]
    if not keys:
        raise UserError("the two runs have no image of the same prompt and seed: sample both with the same ones")
    found: dict[str, list[tuple[ImageScore, float]]] = {}
    for name in dict.fromkeys(name for row in a.rows for name in row.values):
        both = [key for key in keys if name in ours[key].values and name in theirs[key].values]
        if both:
            found[name] = [(ours[key], ours[key].values[name] - theirs[key].values[name]) for key in both]
    return found


def _keyed(rows: Sequence[ImageScore]) -> dict[tuple, ImageScore]:
    """Rows by concept, prompt, noise, and how often that came before."""
    seen: dict[tuple, int] = defaultdict(int)
    keyed = {}
    for row in rows:
        key = (row.concept, row.prompt, row.noise)
        keyed[(*key, seen[key])] = row
        seen[key] += 1
    return keyed


def pool(parts: Mapping[str, Scores], resamples: int = RESAMPLES, seed: int = 0) -> Scores:
    """Put the scores of several concepts together; their intervals are over concepts, prompts and seeds.

    Prompts are the same level wherever they are worded the same ("a {} on the beach"). KID, where all parts
    have it, is the mean of the parts' with an interval over the concepts.

    Args:
        parts: name of the concept -> its scores.
    """
    rows = tuple(dataclasses.replace(row, concept=name) for name, part in parts.items() for row in part.rows)
    summary = summarize(rows, resamples, seed)
    if parts and all(KID in part.summary for part in parts.values()):
        kids = [part.summary[KID].mean for part in parts.values()]
        summary[KID] = bootstrap_mean(kids, {"concept": list(parts)}, resamples, seed)
    first = next((part.metadata for part in parts.values()), ScoringMetadata())
    metadata = dataclasses.replace(
        first,
        concepts=tuple(parts),
        images=len(rows),
        resampled=resampled(rows),
        interval=BootstrapMetadata(LEVEL, resamples, seed),
        kid=first.kid if KID in summary else None,
        references=tuple(file for part in parts.values() for file in part.metadata.references),
    )
    return Scores(rows, summary, metadata)


def resampled(rows: Sequence[ImageScore]) -> dict[str, int]:
    """Return the factors over which the rows' intervals are, and their numbers of levels."""
    return {name: int(np.max(levels, initial=-1)) + 1 for name, levels in factors(columns(rows)).items()}


def as_json(content: Any) -> Any:
    """Return scores, intervals, or containers of them as JSON knows them: null in place of NaN."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return as_json(dataclasses.asdict(content))
    if isinstance(content, dict):
        return {key: as_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [as_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
