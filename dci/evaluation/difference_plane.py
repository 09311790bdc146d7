"""Plot of paired differences to one run, in fidelity and editability: what a comparison shows, and what it does not."""

from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dci.evaluation.metrics import CLIP_T, DINO_I, LABELS
from dci.evaluation.plots import COLOURS, STYLE, add_legend, arms
from dci.evaluation.scores import Scores, difference
from ldm.errors import UserError
from ldm.texts import plotted

_GREY = "#8a8d93"


def difference_plane(runs: Mapping[str, Scores], baseline: str, editability: str = CLIP_T, fidelity: str = DINO_I) -> Figure:
    """Plot how much each run differs from the baseline, with intervals of the paired differences.

    A run is better on an axis, and shown to be, where its interval lies wholly right of the vertical line or above the
    horizontal one. The intervals of means, which `plots.fidelity_editability_plane` draws, are wider by all that concepts
    and prompts do to every run alike. Runs whose names differ behind the last comma alone, such as "ico, plain" and
    "ico, dci", have one colour and a line between them; the first is hollow.

    Args:
        runs: name of a table's row -> its scores.
        baseline: the run at the origin.
        editability, fidelity: metrics of the two axes.

    Raises:
        UserError: there is no such baseline, or a run has no image in common with it or lacks a metric.
    """
    if baseline not in runs:
        raise UserError(f"no row '{baseline}': expected one of {'; '.join(runs)}")
    points: dict[str, list] = {}
    for name, scores in runs.items():
        found = difference(scores, runs[baseline])
        if not {editability, fidelity} <= found.keys():
            raise UserError(f"'{name}' and '{baseline}' have no {LABELS[editability]} and {LABELS[fidelity]} in common")
        points.setdefault(name.rpartition(", ")[0] or name, []).append((name, found[editability], found[fidelity]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=_GREY, linestyle="--", linewidth=1, zorder=1)
        axes.axvline(0, color=_GREY, linestyle="--", linewidth=1, zorder=1)
        for colour, (method, members) in zip(COLOURS * len(points), points.items(), strict=False):
            for number, (name, x, y) in enumerate(members):
                own = name == baseline
                axes.errorbar(
                    x.mean,
                    y.mean,
                    xerr=None if own else arms(x),
                    yerr=None if own else arms(y),
                    fmt="o",
                    color=colour,
                    markerfacecolor="white" if number == 0 and len(members) > 1 else colour,
                    markersize=6,
                    elinewidth=0.8,
                    capsize=2,
                    zorder=3,
                    label=plotted(method) if number == len(members) - 1 else None,
                )
            axes.plot(
                [x.mean for _, x, _ in members], [y.mean for _, _, y in members], color=colour, linewidth=1.5, zorder=2
            )
        settings = {
            tuple(name.rpartition(", ")[2] for name, _, _ in members) for members in points.values() if len(members) > 1
        }
        if len(settings) == 1 and len(pair := settings.pop()) == 2:
            for setting, face in zip(pair, ("white", _GREY), strict=True):
                axes.errorbar([], [], fmt="o", color=_GREY, markerfacecolor=face, markersize=6, label=plotted(setting))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"editability: {LABELS[editability]}, less {plotted(baseline)} →")
        axes.set_ylabel(f"fidelity: {LABELS[fidelity]}, less {plotted(baseline)} →")
        add_legend(figure, list(points))
    return figure
