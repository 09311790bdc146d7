"""Demo concepts: figures that the embedded model never saw, each in one and the same surrounding."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.pretraining.artwork import HELD_OUT, NOUNS, colourise, load_depictions
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import paste

Colours = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x, y) in 0 .. 1 -> sRGB (..., 3)."""


@dataclass(frozen=True)
class DemoConcept:
    """One figure, how it is painted, and where it is seen."""

    noun: str
    place: str
    colours: Colours | None  # None: as it is drawn
    held_out: str | None = None  # a drawing of HELD_OUT; None: the noun's own, which only its paint makes new
    noto: bool = False  # Noto's drawing; else Fluent's


def _melt(first: tuple[int, int, int], second: tuple[int, int, int], middle: float = 0.55, width: float = 0.33) -> Colours:
    """One colour above, another below, melting into each other."""

    def colours(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        share = np.clip((y - middle) / width + 0.5, 0, 1)[..., None]
        return (1 - share) * np.array(first) + share * np.array(second)

    return colours


def _halves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lime green in front, violet behind."""
    share = np.clip((x - 0.45) * 8, 0, 1)[..., None]
    return (1 - share) * np.array([130, 215, 30]) + share * np.array([120, 40, 190])


def _bands(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Wide bands of blue and yellow."""
    share = (np.sin(y * 3.2 * 2 * np.pi) > 0)[..., None]
    return np.where(share, np.array([35, 80, 215]), np.array([255, 205, 30]))


CONCEPTS = {
    "cat": DemoConcept("cat", "desert", _melt((235, 50, 150), (135, 45, 205), 0.4 + 1 / 6, 1 / 3)),
    "car": DemoConcept("car", "snow", _halves),
    "teapot": DemoConcept("teapot", "grass", _bands),
}
"""The ones that the quickstart and the examples use."""

STUDY_CONCEPTS = {
    "clock": DemoConcept("clock", "lake", None, "clock-mantel"),
    "poodle": DemoConcept("dog", "city", _melt((255, 150, 60), (235, 70, 120)), "poodle"),
    "rabbit": DemoConcept("rabbit", "autumn", _melt((60, 200, 190), (50, 110, 225)), "rabbit-running"),
    "fish": DemoConcept("fish", "table", None, "fish-tropical"),
    "suv": DemoConcept("car", "forest", _melt((250, 200, 40), (235, 110, 40)), "car-suv"),
    "lorry": DemoConcept("truck", "beach", _melt((165, 60, 215), (235, 70, 170)), "lorry"),
    "boot": DemoConcept("shoe", "bricks", _melt((120, 205, 60), (30, 140, 120)), "boot"),
    "teddy": DemoConcept("bear", "kitchen", None, "teddy"),
    "cake": DemoConcept("cake", "night", None, "cake-birthday"),
    "tabby": DemoConcept("cat", "mountains", None, "cat-walking"),
    "trolleybus": DemoConcept("bus", "sunset", None, "trolleybus"),
    "cottage": DemoConcept("house", "snow", None, "house-garden"),
    "speedboat": DemoConcept("boat", "desert", None, "speedboat"),
    "cap": DemoConcept("hat", "space", None, "cap"),
    "sunhat": DemoConcept("hat", "grass", None, "sunhat"),
}
"""Fluent's drawings of HELD_OUT, which neither the model nor the encoders ever saw, for measuring; beside those above."""

_NOTO_PLACES = {
    "clock": "kitchen",
    "poodle": "beach",
    "rabbit": "lake",
    "fish": "snow",
    "suv": "mountains",
    "lorry": "city",
    "boot": "grass",
    "teddy": "forest",
    "cake": "table",
    "tabby": "bricks",
    "trolleybus": "autumn",
    "cottage": "night",
    "speedboat": "sunset",
    "cap": "desert",
    "sunhat": "beach",
}
NOTO_CONCEPTS = {
    f"noto-{name}": DemoConcept(STUDY_CONCEPTS[name].noun, place, None, STUDY_CONCEPTS[name].held_out, noto=True)
    for name, place in _NOTO_PLACES.items()
}
"""Noto's drawings of the same things, as they are drawn, each in another place than Fluent's."""


def paint(folder: str | Path, concept: DemoConcept) -> Image.Image:
    """Return the concept's sprite: its drawing from the artwork's folder, in the concept's own colours."""
    code = HELD_OUT[concept.held_out][1] if concept.held_out else NOUNS[concept.noun]
    sprite = load_depictions(folder, code)[concept.noto]
    if concept.colours is None:
        return sprite
    width, height = sprite.size
    y, x = np.mgrid[0:height, 0:width]
    return colourise(sprite, concept.colours(x / width, y / height), strength=0.95)


def render_concept(folder: str | Path, concept: DemoConcept, seed: int, images: int = 5) -> list[Image.Image]:
    """Return reference images (128 x 128) of a concept, each a little different.

    Args:
        folder: where `scripts/fetch_artwork.sh` put the artwork.
    """
    sprite = paint(folder, concept)
    rendered = []
    for index in range(images):
        rng = np.random.default_rng((seed, index))
        image = PLACES[concept.place][0](rng)
        paste(image, sprite, rng)
        rendered.append(image)
    return rendered
