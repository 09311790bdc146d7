"""People's answers about pairs of images, and how often a metric agrees with them."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dci.evaluation.bootstrap import Interval, bootstrap_mean
from dci.evaluation.metrics import CLIP_I, CLIP_T, DINO_I, NOUN, PLACE
from dci.evaluation.ratings import PREFIX, resolved
from dci.evaluation.scores import ImageScore, RunScores
from ldm.errors import UserError

THING, PROMPT = "thing", "prompt"
QUESTIONS = {THING: "Which is more the thing above?", PROMPT: "Which obeys the text more?"}
LEFT, RIGHT, NEITHER = SIDES = ("left", "right", "neither")
METRICS_OF = {THING: (DINO_I, CLIP_I), PROMPT: (CLIP_T, NOUN, PLACE)}
"""Question -> the metrics that answer it, too; ratings are held against both."""


@dataclass(frozen=True)
class Answer:
    """One answer; `left` and `right` are where the images stood on the page."""

    question: str  # of QUESTIONS
    concept: str
    prompt: str
    noise: str
    left_run: str
    left_file: str
    right_run: str
    right_file: str
    answer: str  # left, right or neither
    rater: str = ""
    time: str = ""


@dataclass(frozen=True)
class Agreement:
    """How often a metric prefers the image that people prefer."""

    question: str
    metric: str
    share: Interval  # of answers for one side; where the metric has the same value for both, half


_COLUMNS = [field.name for field in fields(Answer)]


def read_answers(file: str | Path) -> list[Answer]:
    """Read answers; a last line that was cut off is left out.

    Raises:
        UserError: the file is something else.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: expected the answers of dci rate") from error
    table = csv.DictReader(text[: text.rfind("\n") + 1].splitlines(keepends=True))
    if text and (table.fieldnames or [])[:9] != _COLUMNS[:9]:
        raise UserError(f"{file} holds no answers: expected a table with the columns {', '.join(_COLUMNS)}")
    answers = []
    for number, row in enumerate(table, start=2):
        found = Answer(**{name: row.get(name) or "" for name in _COLUMNS})
        if found.question not in QUESTIONS or found.answer not in SIDES:
            raise UserError(
                f"{file}, line {number}: expected a question of {', '.join(QUESTIONS)} and one of "
                f"{', '.join(SIDES)}, not '{found.question}' and '{found.answer}'"
            )
        answers.append(found)
    return answers


def check_writable(file: str | Path) -> None:
    """Raise UserError where answers cannot be added to a file; an empty one is not left behind."""
    file, new = Path(file), not Path(file).exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8"):
            pass
        if new:
            file.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): expected a file that keeps the answers") from error


def append_answer(file: str | Path, answer: Answer) -> None:
    """Add an answer to a file, on the disk when this returns; a last line that was cut off gives way."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", newline="", encoding="utf-8") as opened:
        opened.seek(0)
        text = opened.read()
        if text and not text.endswith("\n"):
            opened.truncate(len(text[: text.rfind("\n") + 1].encode()))
        writer = csv.DictWriter(opened, _COLUMNS, lineterminator="\n")
        if "\n" not in text:
            writer.writeheader()
        writer.writerow(asdict(answer))
        opened.flush()
        os.fsync(opened.fileno())


def agreements(runs: Sequence[RunScores], answers: Iterable[Answer]) -> list[Agreement]:
    """Return for each question and metric how often they agree, over the answers for one side.

    Intervals are over concepts, prompts and seeds, as those of the scores.

    Raises:
        UserError: an answer is about an image that no run has.
    """
    rows = {(run.name, resolved(row.file)): row for run in runs for row in run.scores.rows}
    metrics = dict.fromkeys(name for row in rows.values() for name in row.values)
    ratings = [name for name in metrics if name.startswith(PREFIX)]
    answers = list(answers)
    check_answered(answers, rows)
    decided = []
    for answer in answers:
        left, right = (rows[image] for image in _shown(answer))
        if answer.answer != NEITHER:
            decided.append((answer, left, right))
    found = []
    for question in QUESTIONS:
        for metric in (*(name for name in METRICS_OF[question] if name in metrics), *ratings):
            asked = (each for each in decided if each[0].question == question)
            some = [each for each in asked if metric in each[1].values and metric in each[2].values]
            if some:
                found.append(Agreement(question, metric, _share([_agrees(*each, metric) for each in some], some)))
    return found


def preferences(answers: Iterable[Answer]) -> list[tuple[str, str, str, Interval]]:
    """Return (question, run, other run, share of answers that prefer the first); "neither" counts half for both."""
    groups: dict[tuple[str, str, str], list[tuple[Answer, float]]] = {}
    for answer in answers:
        first, second = sorted((answer.left_run, answer.right_run))
        preferred = {LEFT: answer.left_run, RIGHT: answer.right_run}.get(answer.answer)
        value = 0.5 if preferred is None else float(preferred == first)
        groups.setdefault((answer.question, first, second), []).append((answer, value))
    return [
        (*key, _share([value for _, value in group], [(answer,) for answer, _ in group])) for key, group in groups.items()
    ]


def check_answered(answers: Iterable[Answer], images: Iterable[tuple[str, str]]) -> None:
    """Raise UserError for an answer about an image that is none of a report's.

    Args:
        images: (run, file) of the report.
    """
    known = {(run, resolved(file)) for run, file in images}
    for answer in answers:
        for run, place in _shown(answer):
            if (run, place) not in known:
                raise UserError(
                    f"an answer is about {place} of '{run}', which the report does not have: give the runs the names "
                    "that they had when they were rated"
                )


def _shown(answer: Answer) -> list[tuple[str, str]]:
    """The two images, left and right, that an answer is about."""
    return [(answer.left_run, resolved(answer.left_file)), (answer.right_run, resolved(answer.right_file))]


def _agrees(answer: Answer, left: ImageScore, right: ImageScore, metric: str) -> float:
    difference = left.values[metric] - right.values[metric]
    return float(np.sign(difference) * (1 if answer.answer == LEFT else -1) + 1) / 2


def _share(values: list[float], answered: Sequence[tuple]) -> Interval:
    columns = {
        "concept": [each[0].concept for each in answered],
        "prompt": [each[0].prompt for each in answered],
        "seed": [each[0].noise or f"?{i}" for i, each in enumerate(answered)],
    }
    return bootstrap_mean(values, columns)


def raters(answers: Iterable[Answer]) -> int:
    """Return how many people answered, counted by their names."""
    return len({answer.rater for answer in answers})
