"""The small world: one labelled picture from one seed.

Picture number i of a world with seed s is drawn by a generator seeded with (s, i), so it does not
depend on the order or the process in which it is rendered.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from ldm.pretraining.artwork import COLOURS, NOUNS, Artwork, colourise
from ldm.pretraining.scenes import CANVAS, PLACES, plain

OPENINGS = ("a {}", "a photo of a {}", "photo of a {}", "a picture of a {}", "the {}")


@dataclass(frozen=True)
class LabelledPicture:
    """A rendered picture (64 x 64 RGB), its caption, and what it shows."""

    picture: Image.Image
    caption: str
    noun: str | None  # None: a scene alone
    place: str | None  # None: a plain background


def render(artwork: Artwork, seed: int, index: int) -> LabelledPicture:
    """Draw picture number `index` of the world `seed`."""
    rng = np.random.default_rng((seed, index))
    place = None if rng.random() < 0.08 else list(PLACES)[rng.integers(len(PLACES))]
    scene, phrases = (plain, ("",)) if place is None else PLACES[place]
    picture = scene(rng)
    phrase = phrases[0 if rng.random() < 0.7 else rng.integers(len(phrases))]
    if place is not None and rng.random() < 0.04:
        return LabelledPicture(picture.reduce(2), f"a photo {phrase}", None, place)

    noun = list(artwork.sprites)[rng.integers(len(artwork.sprites))]
    sprite = artwork.sprites[noun][rng.integers(len(artwork.sprites[noun]))]
    described = noun
    if rng.random() < 0.3:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        sprite = colourise(sprite, COLOURS[colour])
        described = f"{colour} {noun}"
    paste(picture, sprite, rng)
    return LabelledPicture(picture.reduce(2), caption(described, phrase, rng), noun, place)


def paste(picture: Image.Image, sprite: Image.Image, rng: Generator) -> None:
    """Put a sprite into a scene: random size, angle, mirror image, brightness, and a soft shadow."""
    size = rng.uniform(0.5, 0.8) * CANVAS / max(sprite.size)
    sprite = sprite.resize([max(1, round(side * size)) for side in sprite.size], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    alpha = sprite.getchannel("A")
    gain = rng.uniform(0.9, 1.08)
    sprite = sprite.convert("RGB").point(lambda value: min(255, int(value * gain)))

    # The subject stands in the lower half, around the middle.
    width, height = sprite.size
    x = int((CANVAS - width) * rng.uniform(0.25, 0.75))
    y = int((CANVAS - height) * rng.uniform(0.45, 0.9))
    shadow = Image.new("L", picture.size)
    shadow.paste(alpha.resize((width, max(1, height // 6))).point(lambda a: a // 3), (x, y + height - height // 8))
    picture.paste((0, 0, 0), mask=shadow.filter(ImageFilter.BoxBlur(3)))
    picture.paste(sprite, (x, y), alpha)


def caption(described: str, phrase: str, rng: Generator) -> str:
    """Say what is seen: "a photo of a red car on the beach"."""
    opening = OPENINGS[0 if rng.random() < 0.4 else rng.integers(len(OPENINGS))]
    text = f"{opening.format(described)} {phrase}".strip()
    text = text.replace("a " + described, with_article(described))
    return text + ("." if rng.random() < 0.2 else "")


def with_article(noun: str) -> str:
    """Return "a car", "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def all_prompts(number: int) -> list[str]:
    """Return `number` prompts "a <noun> <place>" in which every noun and every place comes equally often."""
    nouns, places = list(NOUNS), [phrases[0] for _, phrases in PLACES.values()]
    # One step of the place more in each round of the nouns, so that the pairs differ.
    pairs = [(nouns[i % len(nouns)], places[(i + i // len(nouns)) % len(places)]) for i in range(number)]
    return [f"{with_article(noun)} {place}" for noun, place in pairs]
