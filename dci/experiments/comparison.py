"""A suite's report besides the tables: verdicts on which run is better, and sheets of images."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dci.evaluation.metrics import CLIP_T, DINO_I, PLACE
from dci.evaluation.plots import curves
from dci.evaluation.scores import RunScores, difference
from dci.experiments.grid import GridPoint
from dci.samples.reader import read_samples
from ldm.errors import UserError
from ldm.images import captioned_grid, list_images, read_image, square

AXES = {DINO_I: "fidelity", CLIP_T: "editability"}
"""The two axes that personalisation trades against each other, by the metric of each."""

T = TypeVar("T")


@dataclass(frozen=True)
class PooledRun:
    """The scores of a method and setting over all concepts and seeds, and what the setting is."""

    run: RunScores
    sampling: dict[str, Any]  # the options that the setting gives


def verdict(run: RunScores, baseline: RunScores) -> str:
    """Return a sentence on how a run differs from the baseline on each axis, with the paired differences' intervals."""
    differences = difference(run.scores, baseline.scores)
    better, worse, figures = [], [], []
    for metric, axis in AXES.items():
        found = differences[metric]
        figures.append(f"{axis} ({metric}) {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
        if found.low > 0:
            better.append(axis)
        elif found.high < 0:
            worse.append(axis)
    words = [f"better in {' and '.join(better)}"] if better else []
    words += [f"worse in {' and '.join(worse)}"] if worse else []
    return f"{run.name} against {baseline.name}: {', '.join(words) or 'no difference shown'}; {'; '.join(figures)}."


def verdicts(runs: Sequence[RunScores]) -> list[str]:
    """Compare each run with the first one, and with the first one of its own method, where they share prompts."""
    pairs = [(run, runs[0]) for run in runs[1:]]
    firsts = {run.series: run for run in reversed(runs)}
    pairs += [(run, firsts[run.series]) for run in runs if firsts[run.series] not in (run, runs[0])]
    sentences = []
    for pair in pairs:
        with suppress(UserError):  # of a grid that is not complete: nothing in common, nothing to compare
            sentences.append(verdict(*pair))
    return sentences


def setting_curves(pooled: Sequence[PooledRun]) -> dict[str, Figure]:
    """Return, for each method sampled plainly and with several values of an option, how these differ from plain."""
    figures = {}
    for method in dict.fromkeys(each.run.series for each in pooled):
        own = [each for each in pooled if each.run.series == method]
        plain = next((each.run.scores for each in own if each.sampling.get("no_dci")), None)
        if plain is None:
            continue
        values = varied([(each.sampling, each.run.scores) for each in own])
        shown = [m for m in (DINO_I, CLIP_T, PLACE) if all(m in each.run.scores.summary for each in own)]
        with suppress(UserError):  # of a grid that is not complete: nothing in common with plain sampling
            settings = {
                name: {value: difference(scores, plain) for value, scores in line.items()} for name, line in values.items()
            }
            if settings and shown:
                figures[method] = curves(settings, shown)
    return figures


def varied(settings: Sequence[tuple[dict[str, Any], T]]) -> dict[str, dict[float, T]]:
    """Return, for each number that changes while all other options stay, what belongs to each of its values.

    Args:
        settings: options of a setting, and what belongs to it.
    """
    lines: dict[tuple[str, str], dict[float, T]] = {}
    for options, result in settings:
        for name, value in options.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = ", ".join(f"{key}={other}" for key, other in sorted(options.items()) if key != name)
                lines.setdefault((name, rest), {})[float(value)] = result
    long = {key: line for key, line in lines.items() if len(line) > 1}
    names = [name for name, _ in long]
    return {f"{name} ({rest})" if names.count(name) > 1 else name: line for (name, rest), line in long.items()}


def sheet(points: Sequence[GridPoint], columns: int = 10, width: int = 128) -> Image.Image:
    """Lay out one concept's images: its references above, then a row for each method and setting.

    Each column is a prompt; its image is the first one of the prompt's, never a chosen one.

    Args:
        points: of one concept and seed.
        width: of each image, pixels.
    """
    references = [file for folder in points[0].task.references for file in list_images(folder)][:columns]
    rows = [("references", references, [""] * len(references))]
    for point in points:
        firsts: dict[str, Path] = {}
        for sample in read_samples(point.folder):
            firsts.setdefault(sample.prompt, sample.file)
        prompts = list(firsts)[:columns]
        rows.append((f"{point.method},\n{point.setting}", [firsts[p] for p in prompts], prompts))
    images, captions = [], []
    for label, files, texts in rows:
        missing = columns - len(files)
        blank = [Image.new("RGB", (width, width), "white")] * missing
        images += [_label(label, width), *[square(read_image(file), width) for file in files], *blank]
        captions += ["", *texts, *[""] * missing]
    return captioned_grid(images, captions, columns + 1)


def _label(text: str, width: int) -> Image.Image:
    tile = Image.new("RGB", (width, width), "white")
    draw, size, indent = ImageDraw.Draw(tile), width // 10, 4
    lines = [""]
    for part in re.findall(r"\n|[^\n=,_-]*[=,_-]*", text):  # may be broken behind each of = , _ and -
        if part == "\n" or draw.textlength(lines[-1] + part, font_size=size) > width - 2 * indent:
            lines.append("")
        lines[-1] += part.strip("\n")
    draw.multiline_text((indent, width // 2), "\n".join(filter(None, lines)), fill="black", font_size=size, anchor="lm")
    return tile
