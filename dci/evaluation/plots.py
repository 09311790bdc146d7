"""Plots of scores: the fidelity-editability plane, and the scores of each prompt."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dci.evaluation.answers import QUESTIONS, Agreement
from dci.evaluation.bootstrap import Interval, bootstrap_mean
from dci.evaluation.metrics import CLIP_T, DINO_I, LABELS
from dci.evaluation.scores import ImageScore, RunScores, columns
from ldm.texts import plotted

INK = "#2f3033"
"""Colour of text and axes; `inline_svg` makes it the page's own."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Okabe and Ito's palette, which colour-blind readers can distinguish on light and dark grounds, and two more."""

STYLE = matplotlib.RcParams(
    {
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#8a8d93",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "font.size": 9,
        "legend.frameon": False,
        "svg.hashsalt": "dci",
    }
)
"""What all plots share: thin axes, a faint grid, no frame."""

_MARKERS = "osD^vPX*"


def fidelity_editability_plane(runs: Sequence[RunScores], editability: str = CLIP_T, fidelity: str = DINO_I) -> Figure:
    """Plot each run's means with its intervals; up and to the right is better.

    The dashed line is the Pareto front of all runs: what lies below and left of it is beaten on both axes.
    Each series of several runs has one colour and a front of its own. Runs without both scores are left out.

    Args:
        runs: with `series` where they differ in a parameter only.
        editability, fidelity: metrics of the two axes.
    """
    shown = [run for run in runs if {editability, fidelity} <= run.scores.summary.keys()]
    series = list(dict.fromkeys(run.series or run.name for run in shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(series):
            members = [run for run in shown if (run.series or run.name) == name]
            colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number // len(COLOURS) % len(_MARKERS)]
            points = [(run.scores.summary[editability], run.scores.summary[fidelity]) for run in members]
            for position, (x, y) in enumerate(points):
                axes.errorbar(
                    x.mean,
                    y.mean,
                    xerr=arms(x),
                    yerr=arms(y),
                    fmt=marker,
                    color=colour,
                    markersize=6,
                    elinewidth=1,
                    capsize=2,
                    alpha=0.9,
                    label=None if position else plotted(name),
                )
            if len(members) > 1:
                _draw_front(axes, [(x.mean, y.mean) for x, y in points], color=colour, linewidth=1.2)
            if len(members) > 1 and len(series) <= len(COLOURS):  # the names of more would lie on each other
                for run, (x, y) in zip(members, points, strict=True):
                    text = run.name.removeprefix(name).strip(" ,") or run.name
                    axes.annotate(plotted(text), (x.mean, y.mean), (4, 4), textcoords="offset points", fontsize=7)
        means = [(run.scores.summary[editability].mean, run.scores.summary[fidelity].mean) for run in shown]
        _draw_front(axes, means, color="#8a8d93", linestyle="--", linewidth=1, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"editability: {LABELS[editability]} →")
        axes.set_ylabel(f"fidelity: {LABELS[fidelity]} →")
        add_legend(figure, series)
    return figure


def scores_by_prompt(runs: Sequence[RunScores], metric: str, most: int = 40) -> Figure:
    """Plot each prompt's mean over its images for every run, with bootstrap intervals over its images.

    Args:
        runs: of which the first are shown, as many as there are colours.
        most: prompts that are shown, the first ones.
    """
    runs = runs[: len(COLOURS)]
    prompts = list(dict.fromkeys(row.prompt for run in runs for row in run.scores.rows if metric in row.values))[:most]
    offsets = [(i - (len(runs) - 1) / 2) * 0.7 / len(runs) for i in range(len(runs))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 1.0 + len(prompts) * max(0.3, 0.13 * len(runs))), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(runs):
            means = [_of_prompt([row for row in run.scores.rows if row.prompt == p], metric) for p in prompts]
            having = [(i, mean) for i, mean in enumerate(means) if mean is not None]
            lengths = [[arms(mean)[side][0] for _, mean in having] for side in (0, 1)]
            axes.errorbar(
                [mean.mean for _, mean in having],
                [i + offsets[number] for i, _ in having],
                xerr=lengths,
                fmt="o",
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                elinewidth=1,
                label=plotted(run.name),
            )
        names = [plotted(textwrap.shorten(p, 44, placeholder=" ...")) for p in prompts]
        axes.set_yticks(range(len(prompts)), names, fontsize=8)
        axes.set_ylim(max(1, len(prompts)) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(LABELS[metric])
        add_legend(figure, [run.name for run in runs])
    return figure


def curves(differences: Mapping[str, Mapping[float, Mapping[str, Interval]]], metrics: Sequence[str]) -> Figure:
    """Plot over each setting's values how much each metric differs from plain sampling, with intervals.

    Paired differences: the scores' own intervals are those of concepts and prompts, which are the same for all values.

    Args:
        differences: such as "agg_time" -> value -> metric -> mean difference.
        metrics: a row of plots each.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(differences), 2.2 * len(metrics)), layout="constrained")
        grid = figure.subplots(len(metrics), len(differences), squeeze=False, sharey="row")
        for row, metric in zip(grid, metrics, strict=True):
            row[0].set_ylabel(f"{LABELS[metric]}, less plain")
            for axes, (name, values) in zip(row, differences.items(), strict=True):
                xs = sorted(values)
                intervals = [values[x][metric] for x in xs]
                lengths = [[arms(interval)[side][0] for interval in intervals] for side in (0, 1)]
                axes.errorbar(
                    xs,
                    [i.mean for i in intervals],
                    yerr=lengths,
                    fmt="o-",
                    color=COLOURS[0],
                    markersize=4,
                    elinewidth=1,
                    capsize=2,
                )
                if min(xs) > 0 and max(xs) / min(xs) > 10:
                    axes.set_xscale("log")
                axes.set_xticks(xs, [f"{value:g}" for value in xs])
                axes.minorticks_off()
                axes.set_xlabel(name)
                axes.axhline(0, color="#8a8d93", linestyle="--", linewidth=1)
    return figure


def agreement_plot(agreements: Sequence[Agreement]) -> Figure:
    """Draw how often each metric prefers the image that people prefer, with intervals; the dashed line is chance."""
    names = [f"{LABELS.get(one.metric, one.metric)}\n{QUESTIONS[one.question]}" for one in agreements]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 1.0 + 0.5 * len(agreements)), layout="constrained")
        axes = figure.subplots()
        for number, one in enumerate(agreements):
            colour = COLOURS[list(QUESTIONS).index(one.question)]
            axes.errorbar(one.share.mean, number, xerr=arms(one.share), fmt="o", color=colour, markersize=5, capsize=2)
        axes.axvline(0.5, color="#8a8d93", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(names)), [plotted(name) for name in names], fontsize=7)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of answers that the metric agrees with")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points that no other point equals or exceeds on both axes and exceeds on one,
    from left to right."""

    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and tuple(q) != tuple(p) for q in points)

    return sorted((i for i, p in enumerate(points) if not beaten(p)), key=lambda i: points[i])


def inline_svg(figure: Figure, description: str = "") -> str:
    """Return a figure as an <svg> element for a page: its ink is the page's text colour, its ground transparent.

    Args:
        description: for readers who do not see it.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dci"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Within HTML the namespaces are understood; width and height are the page's affair.
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def add_legend(figure: Figure, names: Sequence[str]) -> None:
    """Names above the plot, where there is more than one; a figure that they would fill grows by their rows."""
    if len(names) < 2:
        return
    inches = max(map(len, names)) * 0.068 + 0.4
    columns = max(1, min(4, len(names), int(figure.get_figwidth() / inches)))
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, rows - 2))
    figure.legend(fontsize=8, loc="outside upper left", ncols=columns, handletextpad=0.3, columnspacing=1.2)


def _draw_front(axes, points: list[tuple[float, float]], **line) -> None:
    front = [points[i] for i in pareto_front(points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), **line)


def arms(interval: Interval) -> list[list[float]]:
    """Lengths of error bars, below and above."""
    if math.isnan(interval.low):
        return [[0.0], [0.0]]
    return [[max(0.0, interval.mean - interval.low)], [max(0.0, interval.high - interval.mean)]]


def _of_prompt(rows: Sequence[ImageScore], metric: str) -> Interval | None:
    rows = [row for row in rows if metric in row.values]
    return bootstrap_mean([row.values[metric] for row in rows], columns(rows), resamples=999) if rows else None
