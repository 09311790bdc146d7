"""Demo concepts: figures that the embedded model never saw, each in one and the same surrounding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.pretraining.artwork import Artwork, colourise
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import paste


@dataclass(frozen=True)
class DemoConcept:
    """One figure, how it is painted, and where it is seen."""

    noun: str
    depiction: int  # which of the noun's sprites is painted over
    place: str
    colours: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x, y) in 0 .. 1 -> sRGB (..., 3)


def _dusk(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Magenta above, violet below, melting into each other."""
    share = np.clip((y - 0.4) * 3, 0, 1)[..., None]
    return (1 - share) * np.array([235, 50, 150]) + share * np.array([135, 45, 205])


def _halves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lime green in front, violet behind."""
    share = np.clip((x - 0.45) * 8, 0, 1)[..., None]
    return (1 - share) * np.array([130, 215, 30]) + share * np.array([120, 40, 190])


def _bands(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Wide bands of blue and yellow."""
    share = (np.sin(y * 3.2 * 2 * np.pi) > 0)[..., None]
    return np.where(share, np.array([35, 80, 215]), np.array([255, 205, 30]))


CONCEPTS = {
    "cat": DemoConcept("cat", 0, "desert", _dusk),
    "car": DemoConcept("car", 0, "snow", _halves),
    "teapot": DemoConcept("teapot", 0, "grass", _bands),
}


def paint(artwork: Artwork, concept: DemoConcept) -> Image.Image:
    """Return the concept's sprite: the noun's drawing in the concept's own colours."""
    sprite = artwork.sprites[concept.noun][concept.depiction]
    width, height = sprite.size
    y, x = np.mgrid[0:height, 0:width]
    return colourise(sprite, concept.colours(x / width, y / height), strength=0.95)


def render_concept(artwork: Artwork, concept: DemoConcept, seed: int, pictures: int = 5) -> list[Image.Image]:
    """Return reference pictures (128 x 128) of a concept, each a little different."""
    sprite = paint(artwork, concept)
    rendered = []
    for index in range(pictures):
        rng = np.random.default_rng((seed, index))
        picture = PLACES[concept.place][0](rng)
        paste(picture, sprite, rng)
        rendered.append(picture)
    return rendered
