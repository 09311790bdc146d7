"""Sheets that show a picture's branches: maps over the picture, and the branches' predictions."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dci.steps import StepPictures, some_steps

TITLES = {
    "weight": "Branch weights $w_c$: 1 (bright) is the concept branch alone, 0 the auxiliary branch alone",
    "concept": "Concept branch: share of the attention that goes to the concept's words",
    "auxiliary": "Auxiliary branch: share of the attention that goes to the auxiliary noun",
}
CELL, DPI = 1.35, 100  # inches of a picture's side; dots per inch


def map_sheet(kind: str, maps: dict[str, np.ndarray], picture: Image.Image, prompt: str, columns: int = 6) -> Image.Image:
    """Draw one kind of maps as heat maps over a picture: a row for each layer, a column for each of some steps.

    Every row has a colour scale of its own, for the layers' maps differ by orders of magnitude.

    Args:
        kind: weight, concept or auxiliary.
        maps: as `MapRecord.arrays` gives them.
        picture: what the maps lie over.
        prompt: the branch's, for the caption.
        columns: how many steps at most.
    """
    timesteps, names = maps["timesteps"], [str(name).split(" ") for name in maps["layers"]]
    shown = some_steps(len(timesteps), len(timesteps), columns)
    figure, cells = _cells(len(names), len(shown) + 1, picture, [TITLES[kind], f'"{prompt}"'], extra=1.9)
    grey = np.asarray(picture.convert("L"))
    for row, (layer, name) in zip(cells, names, strict=True):
        values = maps[f"{layer}/{kind}"][shown].astype(np.float32)
        low, high = values.min(), max(values.max(), values.min() + 1e-6)
        short = name.partition(".transformer")[0].replace("_blocks", "").replace("_block", "")
        row[0].imshow(picture)
        row[0].set_ylabel(f"{layer}\n{short}\n{values.shape[2]} x {values.shape[1]}", rotation=0, ha="right", va="center")
        for axes, heat in zip(row[1:], values, strict=True):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
            image = axes.imshow(heat, "inferno", vmin=low, vmax=high, alpha=0.65, extent=extent, interpolation="nearest")
        bar = figure.colorbar(image, ax=list(row), fraction=0.03, pad=0.01, aspect=12)
        bar.set_ticks([low, (low + high) / 2, high], labels=[_short(v) for v in (low, (low + high) / 2, high)])
        bar.solids.set_alpha(1)
    cells[0][0].set_title("picture")
    for axes, step in zip(cells[0][1:], shown, strict=True):
        axes.set_title(f"call {step + 1}\nt = {timesteps[step]}")
    return _rendered(figure)


def step_sheet(pictures: StepPictures, concept_prompt: str, auxiliary_prompt: str) -> Image.Image:
    """Draw both branches' predicted clean pictures: a row for each branch, a column for each step.

    Where the concept branch runs alone, the auxiliary row is empty.
    """
    both = any(pictures.auxiliary)
    rows = [("concept\nbranch", pictures.concept), ("auxiliary\nbranch", pictures.auxiliary)][: 1 + both]
    title = ["Predicted clean pictures, from the noisiest step on", f'concept branch: "{concept_prompt}"']
    title += [f'auxiliary branch: "{auxiliary_prompt}"'] if both else []
    figure, cells = _cells(len(rows), len(pictures.steps), pictures.concept[0], title, extra=0.9)
    for row, (name, branch) in zip(cells, rows, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, picture in zip(row, branch, strict=True):
            if picture is None:
                axes.set_facecolor("0.94")
                axes.set_xlim(0, 1)
            else:
                axes.imshow(picture)
    for axes, step, t in zip(cells[0], pictures.steps, pictures.timesteps, strict=True):
        axes.set_title(f"call {step + 1}\nt = {t}")
    return _rendered(figure)


def _cells(rows: int, columns: int, picture: Image.Image, title: list[str], extra: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a grid of bare axes of a picture's shape; `extra` inches are left for words at the sides."""
    height = CELL * picture.height / picture.width
    size = (max(CELL * columns + extra, 5.5), height * rows + 0.55 + 0.2 * len(title))
    figure = Figure(size, DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure.suptitle("\n".join(title), fontsize=9, x=0.02, ha="left")
    cells = figure.subplots(rows, columns, squeeze=False)
    for axes in cells.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.title.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
        axes.set_box_aspect(picture.height / picture.width)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, cells.tolist()


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.0e}"


def _rendered(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
