"""The results of a grid: one table of all cells, and one report of its methods and settings."""

import csv
import io
import json
from pathlib import Path

from dci.bootstrap import bootstrap_mean
from dci.files import write_atomically
from dci.grid import Cell
from dci.metrics import KID
from dci.report import write_report
from dci.scores import RunScores, Scores, pool

PLACE = ("concept", "method", "seed", "setting")


def write_table(cells: list[Cell], file: Path) -> None:
    """Write a CSV with a row for each cell: its place, and each metric's mean and 95 % interval; every digit."""
    results = [json.loads(cell.result.read_text()) for cell in cells]
    metrics = list(dict.fromkeys(name for result in results for name in result["summary"]))
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow([*PLACE, *(f"{name}{part}" for name in metrics for part in ("", "_low", "_high"))])
    for result in results:
        intervals = [result["summary"].get(name, {}) for name in metrics]
        table.writerow([*(result[name] for name in PLACE),
                        *(interval.get(part) for interval in intervals for part in ("mean", "low", "high"))])  # fmt: skip
    write_atomically(file, content.getvalue().encode())


def pooled_runs(cells: list[Cell]) -> list[RunScores]:
    """Return the scores of each method and setting, over all concepts and seeds."""
    rows = dict.fromkeys((cell.method, cell.setting) for cell in cells)
    several = len({setting for _, setting in rows}) > 1
    runs = []
    for method, setting in rows:
        parts: dict[str, list[Scores]] = {}
        for cell in cells:
            if (cell.method, cell.setting) == (method, setting):
                parts.setdefault(cell.concept, []).append(Scores.load(cell.result))
        pooled = pool({concept: _together(scores) for concept, scores in parts.items()})
        runs.append(RunScores(f"{method}, {setting}" if several else method, pooled, series=method))
    return runs


def write_grid_report(cells: list[Cell], folder: Path, title: str) -> Path:
    """Write a report as evaluate.py does, with a row for each method and setting.

    Returns:
        The HTML page.
    """
    return write_report(folder, pooled_runs(cells), title)


def _together(seeds: list[Scores]) -> Scores:
    """The scores of one concept from all seeds; KID, which pictures do not have by themselves, is the seeds' mean."""
    summary = {}
    if all(KID in scores.summary for scores in seeds):
        labels = {"seed": [str(i) for i in range(len(seeds))]}
        summary[KID] = bootstrap_mean([scores.summary[KID].mean for scores in seeds], labels)
    return Scores(tuple(row for scores in seeds for row in scores.rows), summary, seeds[0].facts)
