"""The results of a grid: one table of all points, and one report of its methods and settings."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from dci.evaluation.answers import read_answers
from dci.evaluation.bootstrap import bootstrap_mean
from dci.evaluation.metrics import KID
from dci.evaluation.plots import fidelity_editability_plane
from dci.evaluation.ratings import with_ratings
from dci.evaluation.report import write_report
from dci.evaluation.scores import RunScores, Scores, pool
from dci.experiments import comparison
from dci.experiments.comparison import PooledRun
from dci.experiments.grid import GridPoint
from dci.files import write_atomically
from ldm.texts import readable

PLACE = ("concept", "method", "seed", "setting")


def write_table(points: Sequence[GridPoint], file: Path) -> None:
    """Write a CSV with a row for each point: its place, its setting's options, each metric's mean and 95 % interval."""
    summaries = [Scores.load(point.result).summary for point in points]
    options = list(dict.fromkeys(name for point in points for name in point.sampling))
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary))
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow([*PLACE, *options, *(f"{name}{part}" for name in metrics for part in ("", "_low", "_high"))])
    for point, summary in zip(points, summaries, strict=True):
        bounds = [(i.mean, i.low, i.high) if (i := summary.get(name)) else (math.nan,) * 3 for name in metrics]
        numbers = ["" if math.isnan(number) else number for bound in bounds for number in bound]
        table.writerow(
            [*(getattr(point, name) for name in PLACE), *(point.sampling.get(name) for name in options), *numbers]
        )
    write_atomically(file, readable(content.getvalue()).encode())


def pooled_runs(points: Sequence[GridPoint]) -> list[PooledRun]:
    """Return the scores of each method and setting, over all concepts and seeds."""
    rows = dict.fromkeys((point.method, point.setting) for point in points)
    several = len({setting for _, setting in rows}) > 1
    runs = []
    for method, setting in rows:
        own = [point for point in points if (point.method, point.setting) == (method, setting)]
        parts: dict[str, list[Scores]] = {}
        for point in own:
            parts.setdefault(point.concept, []).append(Scores.load(point.result))
        pooled = pool({concept: _together(scores) for concept, scores in parts.items()})
        run = RunScores(f"{method}, {setting}" if several else method, pooled, series=method)
        runs.append(PooledRun(run, own[0].sampling))
    return runs


def write_grid_report(
    points: Sequence[GridPoint],
    outdir: Path,
    title: str,
    notes: Sequence[str] = (),
    ratings: str | None = None,
    answers: str | None = None,
) -> Path:
    """Write the report of the points that are done: a row for each method and setting, and what compares them.

    Args:
        ratings: a CSV, see `dci.evaluation.ratings`.
        answers: a CSV of people's answers to pairs, see `dci.evaluation.answers`.

    Returns:
        The HTML page.
    """
    pooled = pooled_runs(points)
    runs = [each.run for each in pooled]
    runs = with_ratings(runs, ratings) if ratings else runs
    outdir.mkdir(parents=True, exist_ok=True)
    for concept in dict.fromkeys(point.concept for point in points):
        own = [point for point in points if point.concept == concept]
        chosen = [point for point in own if point.seed == own[0].seed]
        comparison.sheet(chosen).save(outdir / f"sheet-{concept}.webp", quality=90)
    fidelity_editability_plane(runs).savefig(outdir / "plane.png", dpi=120)
    figures = []
    for method, curves in comparison.setting_curves(pooled).items():
        curves.savefig(outdir / f"curves-{method}.png", dpi=120)
        figures.append((f"{method}: one setting changed at a time, less plain sampling of the same noise", curves))
    said = read_answers(answers) if answers else ()
    return write_report(outdir, runs, title, [*notes, *comparison.verdicts(runs)], figures, answers=said)


def _together(seeds: list[Scores]) -> Scores:
    """The scores of one concept from all seeds; KID, which images do not have by themselves, is the seeds' mean."""
    summary = {}
    if all(KID in scores.summary for scores in seeds):
        labels = {"seed": [str(i) for i in range(len(seeds))]}
        summary[KID] = bootstrap_mean([scores.summary[KID].mean for scores in seeds], labels)
    return Scores(tuple(row for scores in seeds for row in scores.rows), summary, seeds[0].metadata)
