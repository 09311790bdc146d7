"""Ratings that others gave, as further columns of a report: brought in from a CSV, never made here."""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from dci.evaluation.metrics import LABELS
from dci.evaluation.scores import ImageScore, RunScores, summarize
from ldm.errors import UserError

PREFIX = "rating: "
"""Begins the name of a metric that is a rating; the CSV's column follows."""

_OWN = {"run", "file", "concept", "prompt", "text", "seed", *LABELS}


def with_ratings(runs: Sequence[RunScores], file: str | Path) -> list[RunScores]:
    """Return the runs with the ratings of a CSV among their scores, each with its mean and interval.

    Args:
        file: a report's `pictures.csv` with further columns of numbers, or any table with the columns `file` and, where
            a file's name is not enough, `run`; empty cells are no ratings.

    Raises:
        UserError: the table has no such columns, a cell that is no number, or an image that no run has.
    """
    ratings = read_ratings(file)
    known = {(run.name, _place(row.file)) for run in runs for row in run.scores.rows}
    known |= {("", place) for _, place in known}
    for run, place in ratings:
        if (run, place) not in known:
            raise UserError(
                f"{file} rates {place} of {f'run {run}' if run else 'any run'}, which the report does not show: "
                "take its pictures.csv, and add columns"
            )
    return [_rated(run, ratings) for run in runs]


def read_ratings(file: str | Path) -> dict[tuple[str, str], dict[str, float]]:
    """Return (run or "", file) -> rating's name -> value.

    Raises:
        UserError: see `with_ratings`.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened)
            columns = [name for name in table.fieldnames or () if name not in _OWN]
            rows = list(table)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    if "file" not in (table.fieldnames or ()) or not columns:
        raise UserError(f"{file}: expected a column 'file' and columns of ratings, as in a report's pictures.csv")
    ratings: dict[tuple[str, str], dict[str, float]] = {}
    for number, row in enumerate(rows, start=2):
        values = {name: _number(row[name], file, number, name) for name in columns if (row[name] or "").strip()}
        ratings.setdefault((row.get("run") or "", _place(row["file"])), {}).update(values)
    return ratings


def _number(text: str, file: str | Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file}, line {line}: {column} is '{text}': expected a number, or nothing")
    return value


def _place(file: str) -> str:
    return str(Path(file).resolve())


def _rated(run: RunScores, ratings: dict[tuple[str, str], dict[str, float]]) -> RunScores:
    def values(row: ImageScore) -> dict[str, float]:
        found = ratings.get((run.name, _place(row.file)), {}) or ratings.get(("", _place(row.file)), {})
        return {PREFIX + name: value for name, value in found.items()}

    added = [values(row) for row in run.scores.rows]
    bare = [dataclasses.replace(row, values=new) for row, new in zip(run.scores.rows, added, strict=True)]
    rows = tuple(dataclasses.replace(row, values=row.values | new) for row, new in zip(run.scores.rows, added, strict=True))
    scores = dataclasses.replace(run.scores, rows=rows, summary=run.scores.summary | summarize(bare))
    return dataclasses.replace(run, scores=scores)
