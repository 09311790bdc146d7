"""What can be seen inside an image: branch weights over it, and both branches' predictions, step by step."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from dci.app import markup
from dci.app.drawing import DCI, PLAIN, Drawing
from ldm.errors import UserError


@dataclass(frozen=True)
class Range:
    """How far the sliders go."""

    steps: int
    layers: int
    dual_steps: int


def ranges(drawing: Drawing) -> Range:
    """Return how many steps and layers there are to look at."""
    side = drawing.sides[DCI]
    return Range(len(side.steps.timesteps), len(side.maps.layers) if side.maps else 0, side.steps.dual_steps)


def look(drawing: Drawing, number: int, step: int, layer: int) -> str:
    """Return a row of images as HTML: the weights over the image, both branches' predictions, plain sampling's.

    Args:
        number: of the image, from 0.
        step: from 1.
        layer: in the order they run, from 0.

    Raises:
        UserError: there is no such image, or its model is no longer loaded.
    """
    model = drawing.model()
    if model is None:
        raise UserError("another model has been loaded since: draw the image again")
    there = ranges(drawing)
    if not (0 <= number < drawing.wanted.n and drawing.finished):
        raise UserError("there is no such image: draw first")
    step = min(max(step, 1), there.steps)
    dual, plain = (drawing.sides[name] for name in (DCI, PLAIN))
    seen = dual.steps.images(model, number, [step - 1])
    cells = [_weights(drawing, number, step, min(max(layer, 0), max(there.layers - 1, 0)))]
    cells.append(markup.figure(seen.concept[0], f"Concept branch at step {step}", caption="Concept branch predicts"))
    [auxiliary] = seen.auxiliary
    if auxiliary is None:
        cells.append(_empty(f"Auxiliary branch: ended after step {there.dual_steps}"))
    else:
        cells.append(markup.figure(auxiliary, f"Auxiliary branch at step {step}", caption="Auxiliary branch predicts"))
    [alone] = plain.steps.images(model, number, [step - 1]).concept
    cells.append(markup.figure(alone, f"Plain sampling at step {step}", caption="Plain sampling predicts"))
    text = f"Image {number + 1}, step {step} of {there.steps}, timestep {dual.steps.timesteps[step - 1]}"
    return f'<p class="dci-note">{text}</p><div class="dci-inside">{"".join(cells)}</div>'


def _weights(drawing: Drawing, number: int, step: int, layer: int) -> str:
    """The branch weights of a step and layer over the finished image, from their lowest to their highest."""
    side, there = drawing.sides[DCI], ranges(drawing)
    if not there.dual_steps or side.maps is None:
        return _empty("No branch weights: T_a is 0, so the auxiliary branch never ran")
    if step > there.dual_steps:
        return _empty(f"No branch weights: the concept branch runs alone after step {there.dual_steps}")
    arrays = side.maps.arrays(number)
    name = str(arrays["layers"][layer])
    values = arrays[f"{name.split(' ')[0]}/weight"][step - 1].astype(np.float32)
    low, high = float(values.min()), float(values.max())
    over = heat_over(side.images[number], values, low, high)
    part, size = _block(name), f"{values.shape[1]} × {values.shape[0]}"
    scale = (
        f'<div class="dci-scale"><span>{low:.2f}</span><i aria-hidden="true"></i><span>{high:.2f}</span></div>'
        '<p class="dci-note">1: the concept branch alone. 0: the auxiliary branch alone.</p>'
    )
    text = f"Branch weights at step {step} in layer {layer}, {part}, from {low:.2f} to {high:.2f}"
    caption = f"Branch weights, layer {layer}, {part}, {size}"
    return f"<div>{markup.figure(over, text, caption=caption)}{scale}</div>"


def _block(name: str) -> str:
    """ "layer9 output_blocks.5.1.transformer_blocks.0.attn2" -> "output block 5" """
    parts = name.partition(" ")[2].split(".")
    return f"{parts[0].removesuffix('_blocks')} block {parts[1]}" if parts[0].endswith("_blocks") else "middle block"


def heat_over(image: Image.Image, values: np.ndarray, low: float, high: float) -> Image.Image:
    """Lay a heat map over the image in grey.

    Args:
        values: (h, w), of fewer pixels than the image.
        low, high: ends of the colour scale.
    """
    share = (values - low) / max(high - low, 1e-6)
    colours = Image.fromarray((255 * matplotlib.colormaps["inferno"](share)[..., :3]).round().astype(np.uint8))
    heat = colours.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), heat, 0.65)


def _empty(text: str) -> str:
    return f'<figure class="dci-empty"><div>{text}</div></figure>'
