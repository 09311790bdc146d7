"""What a suite's report says besides the tables: which run is better, and sheets of pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dci.bootstrap import Interval
from dci.grid import Cell
from dci.metrics import CLIP_T, DINO_I, PLACE
from dci.plots import curves
from dci.samples import read_samples
from dci.scores import RunScores, difference
from ldm.images import captioned_grid, list_pictures, read_picture, square

AXES = {DINO_I: "fidelity", CLIP_T: "editability"}
"""The two axes that personalisation trades against each other, by the metric of each."""

PLAIN = "plain"
"""The setting without DCI goes by this name."""


def verdict(run: RunScores, baseline: RunScores) -> str:
    """Say in one sentence on which axes a run differs from the baseline, with the paired differences' intervals."""
    differences = difference(run.scores, baseline.scores)
    better, worse, said = [], [], []
    for metric, axis in AXES.items():
        found = differences[metric]
        said.append(f"{axis} ({metric}) {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
        if found.low > 0:
            better.append(axis)
        elif found.high < 0:
            worse.append(axis)
    words = [f"better in {' and '.join(better)}"] if better else []
    words += [f"worse in {' and '.join(worse)}"] if worse else []
    return f"{run.name} against {baseline.name}: {', '.join(words) or 'no difference shown'}; {'; '.join(said)}."


def verdicts(runs: Sequence[RunScores]) -> list[str]:
    """Compare each run with the first one, and with the first one of its own method."""
    pairs = [(run, runs[0]) for run in runs[1:]]
    firsts = {run.series: run for run in reversed(runs)}
    pairs += [(run, firsts[run.series]) for run in runs if firsts[run.series] not in (run, runs[0])]
    return [verdict(*pair) for pair in pairs]


def setting_curves(runs: Sequence[RunScores]) -> dict[str, Figure]:
    """Return, for each method drawn plainly and with several values of a setting, how these differ from plain."""
    figures = {}
    for method in dict.fromkeys(run.series for run in runs):
        plain = next((run.scores for run in runs if run.name == f"{method}, {PLAIN}"), None)
        settings: dict[str, dict[float, dict[str, Interval]]] = {}
        for run in runs:
            found = re.fullmatch(r".*-(\w+)=(-?[\d.]+)", run.name)
            if plain and found and run.series == method:
                settings.setdefault(found[1], {})[float(found[2])] = difference(run.scores, plain)
        settings = {name: values for name, values in settings.items() if len(values) > 1}
        if settings:
            shown = [metric for metric in (DINO_I, CLIP_T, PLACE) if all(metric in run.scores.summary for run in runs)]
            figures[method] = curves(settings, shown)
    return figures


def sheet(cells: Sequence[Cell], columns: int = 10, width: int = 128) -> Image.Image:
    """Draw one concept's pictures: its references above, then a row for each method and setting.

    Each column is a prompt; its picture is the first one of the prompt's, never a chosen one.

    Args:
        cells: of one concept and seed.
        width: of each picture, pixels.
    """
    references = [file for folder in cells[0].references for file in list_pictures(folder)][:columns]
    rows = [("references", references, [""] * len(references))]
    for cell in cells:
        firsts: dict[str, Path] = {}
        for sample in read_samples(cell.folder):
            firsts.setdefault(sample.prompt, sample.file)
        prompts = list(firsts)[:columns]
        rows.append((f"{cell.method},\n{cell.setting}", [firsts[p] for p in prompts], prompts))
    pictures, captions = [], []
    for label, files, texts in rows:
        missing = columns - len(files)
        blank = [Image.new("RGB", (width, width), "white")] * missing
        pictures += [_label(label, width), *[square(read_picture(file), width) for file in files], *blank]
        captions += ["", *texts, *[""] * missing]
    return captioned_grid(pictures, captions, columns + 1)


def _label(text: str, width: int) -> Image.Image:
    tile = Image.new("RGB", (width, width), "white")
    ImageDraw.Draw(tile).multiline_text((4, width // 2), text, fill="black", font_size=width // 10, anchor="lm")
    return tile
