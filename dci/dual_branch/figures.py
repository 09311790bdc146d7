"""Sheets that show an image's branches: maps over the image, and the branches' predictions."""

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dci.dual_branch.predictions import StepImages, choose_steps
from ldm.texts import plotted

TITLES = {
    "weight": "Branch weights $w_c$: 1 is the concept branch alone, 0 the auxiliary branch alone",
    "concept": "Concept branch: share of the attention that goes to the concept's words",
    "auxiliary": "Auxiliary branch: share of the attention that goes to the auxiliary noun",
}
CELL, GAP, LEFT, BAR = 1.3, 0.06, 0.75, 0.6  # inches: an image's width, and what is between, left and right of images
LINE, DPI = 0.17, 100  # inches of a line of words; dots per inch


def map_sheet(kind: str, maps: dict[str, np.ndarray], image: Image.Image, prompt: str, columns: int = 6) -> Image.Image:
    """Plot one kind of maps as heat maps over an image: a row for each layer, a column for each of some steps.

    Every row has a colour scale of its own, for the layers' maps differ by orders of magnitude.

    Args:
        kind: weight, concept or auxiliary.
        maps: as `MapRecord.arrays` gives them.
        image: what the maps lie over.
        prompt: the branch's, for the caption.
        columns: how many steps at most.
    """
    timesteps, names = maps["timesteps"], [str(name).split(" ") for name in maps["layers"]]
    shown = choose_steps(len(timesteps), len(timesteps), columns)
    title = [TITLES[kind] + "; each row has its scale", _quoted(prompt)]
    figure, cells = _cells(len(names), len(shown) + 1, image, title, right=BAR)
    grey, extent = image.convert("L"), (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    for row, (layer, name) in zip(cells, names, strict=True):
        values = maps[f"{layer}/{kind}"][shown].astype(np.float32)
        low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-6)
        short = name.partition(".transformer")[0].replace("_blocks", "").replace("_block", "")
        _name(row[0], f"{layer}\n{short}\n{values.shape[2]} x {values.shape[1]}")
        row[0].imshow(image)
        for axes, heat in zip(row[1:], values, strict=True):
            axes.imshow(grey, "gray", vmin=0, vmax=255)
            heat_map = axes.imshow(heat, "inferno", vmin=low, vmax=high, alpha=0.65, extent=extent, interpolation="nearest")
        x, y, width, height = row[-1].get_position().bounds
        inch = width / CELL
        place = (x + width + GAP * inch, y + 0.08 * height, 0.08 * inch, 0.84 * height)
        bar = figure.colorbar(heat_map, cax=figure.add_axes(place))
        bar.set_ticks([low, high], labels=[_short(low), _short(high)], fontsize=7)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
    _head(cells[0], ["image", *(f"call {step + 1}\nt = {timesteps[step]}" for step in shown)])
    return _rendered(figure)


def step_sheet(images: StepImages, concept_prompt: str, auxiliary_prompt: str) -> Image.Image:
    """Plot both branches' predicted clean images: a row for each branch, a column for each step.

    Where the concept branch runs alone, the auxiliary row is empty.
    """
    both = any(images.auxiliary)
    rows: list[tuple[str, list[Image.Image | None]]]
    rows = [("concept\nbranch", list(images.concept))]
    rows += [("auxiliary\nbranch", images.auxiliary)] if both else []
    title = ["Predicted clean images, from the noisiest step on", f"concept branch: {_quoted(concept_prompt)}"]
    title += [f"auxiliary branch: {_quoted(auxiliary_prompt)}"] if both else []
    figure, cells = _cells(len(rows), len(images.steps), images.concept[0], title)
    for row, (name, branch) in zip(cells, rows, strict=True):
        _name(row[0], name)
        for axes, image in zip(row, branch, strict=True):
            if image is None:
                axes.set_facecolor("0.94")
            else:
                axes.imshow(image)
    _head(cells[0], [f"call {s + 1}\nt = {t}" for s, t in zip(images.steps, images.timesteps, strict=True)])
    return _rendered(figure)


def _cells(
    rows: int, columns: int, image: Image.Image, title: list[str], right: float = 0.1
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a grid of bare axes of an image's shape, and a title above it.

    Args:
        right: inches left free at the right.
    """
    tall = CELL * image.height / image.width
    top = LINE * (len(title) + 2) + 0.2
    width = max(LEFT + columns * (CELL + GAP) + right, 6.0)
    height = top + rows * (tall + GAP) + 0.05
    figure = Figure((width, height), DPI)
    figure.text(0.1 / width, 1 - 0.08 / height, "\n".join(title), fontsize=9, va="top")

    def cell(row: int, column: int) -> Axes:
        left, bottom = LEFT + column * (CELL + GAP), height - top - row * (tall + GAP) - tall
        axes = figure.add_axes((left / width, bottom / height, CELL / width, tall / height), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    return figure, [[cell(row, column) for column in range(columns)] for row in range(rows)]


def _name(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")


def _head(row: list[Axes], names: list[str]) -> None:
    for axes, name in zip(row, names, strict=True):
        axes.set_title(name, fontsize=8)


def _quoted(prompt: str) -> str:
    # Longer ones would run out of the sheet.
    return '"' + plotted(textwrap.shorten(prompt, 70, placeholder=" ...")) + '"'


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.0e}"


def _rendered(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
