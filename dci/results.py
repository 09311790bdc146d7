"""The results of a grid: one table of all cells, and one report of its methods and settings."""

import csv
import io
import json
from pathlib import Path

from dci.files import write_atomically
from dci.grid import Cell

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


def write_grid_report(cells: list[Cell], folder: Path, title: str) -> Path:
    """Write a report with a row for each method and setting, over all concepts and seeds.

    Returns:
        The HTML page.
    """
    from dci.report import write_report
    from dci.scores import RunScores, pool

    rows = dict.fromkeys((cell.method, cell.setting) for cell in cells)
    several = len({setting for _, setting in rows}) > 1
    runs = []
    for method, setting in rows:
        members = [cell for cell in cells if (cell.method, cell.setting) == (method, setting)]
        concepts = dict.fromkeys(cell.concept for cell in members)
        parts = {concept: _scores([cell for cell in members if cell.concept == concept]) for concept in concepts}
        runs.append(RunScores(f"{method}, {setting}" if several else method, pool(parts), series=method))
    return write_report(folder, runs, title)


def _scores(cells: list[Cell]):
    """The scores of one concept, of all seeds together."""
    from dci.bootstrap import bootstrap_mean
    from dci.metrics import KID
    from dci.scores import RunScores, Scores

    return cells, RunScores, Scores, KID, bootstrap_mean
