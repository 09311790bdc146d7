"""Ratings that others gave, as further columns of a report: brought in from a CSV, never made here."""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dci.evaluation.metrics import LABELS
from dci.evaluation.scores import ImageScore, RunScores, summarize
from ldm.errors import UserError

PREFIX = "rating: "
"""Begins the name of a metric that is a rating; the CSV's column follows."""

Ratings = dict[tuple[str, str], dict[str, float]]
"""(run or "", image) -> rating's name -> value."""

_OWN = {"run", "file", "concept", "prompt", "text", "seed", *LABELS}


def with_ratings(runs: Sequence[RunScores], file: str | Path) -> list[RunScores]:
    """Return the runs with the ratings of a CSV among their scores, each with its mean and interval.

    Args:
        file: a report's `images.csv` with further columns of numbers, or any table with the columns `file` and, where
            a file's name is not enough, `run`; empty cells are no ratings.

    Raises:
        UserError: the table has no such columns or no ratings, two columns or two lines say the same thing, a cell is
            no number, or an image is in no run.
    """
    ratings = read_ratings(file)
    check_rated(ratings, ((run.name, row.file) for run in runs for row in run.scores.rows), file)
    return [_rated(run, ratings) for run in runs]


def check_rated(ratings: Ratings, images: Iterable[tuple[str, str]], file: str | Path) -> None:
    """Raise UserError for a rating of an image that is none of a report's.

    Args:
        images: (run, file) of the report.
        file: the ratings', for the message.
    """
    known = {(run, resolved(image)) for run, image in images}
    known |= {("", place) for _, place in known}
    for run, place in ratings:
        if (run, place) not in known:
            raise UserError(
                f"{file} rates {place} of {f'run {run}' if run else 'any run'}, which the report does not show: "
                "take its images.csv, and add columns"
            )


def read_ratings(file: str | Path) -> Ratings:
    """Return (run or "", file) -> rating's name -> value.

    Raises:
        UserError: see `with_ratings`.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            header, *rows = list(csv.reader(opened)) or [[]]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    columns = [name for name in header if name not in _OWN]
    if "file" not in header or not columns:
        raise UserError(f"{file}: expected a column 'file' and columns of ratings, as in a report's images.csv")
    if len(set(header)) < len(header):
        raise UserError(f"{file}: expected columns of different names, and it has {', '.join(header)}")
    ratings: Ratings = {}
    for number, cells in enumerate(rows, start=2):
        if not any(map(str.strip, cells)):
            continue
        if len(cells) != len(header):
            raise UserError(f"{file}, line {number}: {len(cells)} cells, expected {len(header)} as in its first line")
        row = dict(zip(header, cells, strict=True))
        key = row.get("run", ""), resolved(row["file"])
        if not row["file"].strip() or key in ratings:
            raise UserError(
                f"{file}, line {number}: it {'rates an image twice' if row['file'].strip() else 'names no file'}"
            )
        ratings[key] = {name: _number(row[name], file, number, name) for name in columns if row[name].strip()}
    if not any(ratings.values()):
        raise UserError(f"{file}: there is no rating in {', '.join(columns)}: expected numbers in some of the lines")
    return ratings


def _number(text: str, file: str | Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file}, line {line}: {column} is '{text}': expected a number, or nothing")
    return value


def resolved(file: str) -> str:
    """Return an image's absolute path: a report may name it from its own folder, a table from another."""
    return str(Path(file).resolve())


def _rated(run: RunScores, ratings: Ratings) -> RunScores:
    def values(row: ImageScore) -> dict[str, float]:
        found = ratings.get((run.name, resolved(row.file)), {}) or ratings.get(("", resolved(row.file)), {})
        return {PREFIX + name: value for name, value in found.items()}

    added = [values(row) for row in run.scores.rows]
    bare = [dataclasses.replace(row, values=new) for row, new in zip(run.scores.rows, added, strict=True)]
    rows = tuple(dataclasses.replace(row, values=row.values | new) for row, new in zip(run.scores.rows, added, strict=True))
    scores = dataclasses.replace(run.scores, rows=rows, summary=run.scores.summary | summarize(bare))
    return dataclasses.replace(run, scores=scores)
