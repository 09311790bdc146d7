"""Reports of scores: tables (CSV, JSON, Markdown) and one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dci.scores import RunScores


def write_report(
    outdir: str | Path,
    runs: Sequence[RunScores],
    title: str,
    notes: Sequence[str] = (),
    figures: Sequence[tuple[str, Figure]] = (),
    max_pictures: int = 160,
) -> Path:
    """Write `report.html`, `report.md`, `scores.json`, `summary.csv` and `pictures.csv`.

    Args:
        runs: rows of the tables; the differences are those to the first.
        notes: paragraphs below the title.
        figures: (caption, figure) behind the page's own plots.
        max_pictures: that the page may show.

    Returns:
        The page's file.
    """
    raise NotImplementedError
