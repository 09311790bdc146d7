"""Concepts that differ in one factor: the same noun seen or unseen, repainted, small or large, in one surrounding each."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.pretraining.artwork import HELD_OUT, NOUNS, PAINTED, colourise, load_depictions, melting
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import SIZES, USUAL_SIZE, paste

DRAWINGS = {
    "dog": "poodle",
    "rabbit": "rabbit-running",
    "fish": "fish-tropical",
    "house": "house-garden",
    "truck": "lorry",
    "shoe": "boot",
    "bear": "teddy",
    "cake": "cake-birthday",
}
"""Noun -> its drawing of HELD_OUT."""

VARIANTS = ("usual", "seen", "painted", "small", "large")
"""Unseen drawing in its own colours and the usual size; then one thing changed: a drawing that the base model was trained
on, two other colours that melt into each other, the sizes of the captions' "small" and "big"."""


def render_variant(artwork: str | Path, noun: str, variant: str, seed: int, images: int = 5) -> list[Image.Image]:
    """Return reference images (128 x 128) of a noun in a variant; surroundings and places are those of its other variants.

    Args:
        artwork: where `scripts/fetch_artwork.sh` put it.
    """
    seen = variant == "seen"
    drawings = load_depictions(artwork, NOUNS[noun] if seen else HELD_OUT[DRAWINGS[noun]][1])
    sprite = drawings[1 if seen and noun in PAINTED else 0]
    number = list(DRAWINGS).index(noun)
    if variant == "painted":
        rng = np.random.default_rng((seed, number))
        first, second = rng.uniform(20, 245, (2, 3))
        sprite = colourise(sprite, melting(sprite.size, first, second, rng), strength=0.95)
    size = {"small": SIZES["small"], "large": SIZES["big"]}.get(variant, USUAL_SIZE)
    rendered = []
    for index in range(images):
        rng = np.random.default_rng((seed, number, index))
        image = list(PLACES.values())[(5 * number) % len(PLACES)][0](rng)
        paste(image, sprite, rng, size)
        rendered.append(image)
    return rendered
