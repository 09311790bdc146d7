"""The toy world: one labelled image from one seed.

Image number i of a world with seed s is rendered by a generator seeded with (s, i), so it does not
depend on the order or the process in which it is rendered.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from ldm.images import captioned_grid
from ldm.pretraining.artwork import COLOURS, NOUNS, Artwork, colourise, melting
from ldm.pretraining.scenes import CANVAS, PLACES, plain

OPENINGS = ("a {}", "a photo of a {}", "photo of a {}", "a picture of a {}", "the {}")
SIZES = {"small": (0.3, 0.42), "big": (0.8, 0.95)}
"""Size word -> the longer side of the sprite, as a share of the image's."""
USUAL_SIZE = (0.5, 0.8)
CLOSE_VIEW, CLOSE_SIZE = "a close view of a {}", (1.0, 1.3)
"""Wide world: a subject that the image's edge crops."""


@dataclass(frozen=True)
class LabelledImage:
    """A rendered image (64 x 64 RGB), its caption, and what it shows."""

    image: Image.Image
    caption: str
    noun: str | None  # None: a scene alone; in the wide world also a name that is none of the 64 nouns
    place: str | None  # None: a plain background
    second: str | None = None  # the other noun, where there are two


@dataclass(frozen=True)
class Figure:
    """A sprite and how the caption calls it."""

    noun: str
    sprite: Image.Image
    described: str  # "red car"


def render(artwork: Artwork, seed: int, index: int) -> LabelledImage:
    """Render image number `index` of the world `seed`.

    Of 100 images about 8 have a plain background, 4 no subject, 10 two; of single subjects 30 % have a
    colour of their own and 12 % a size that the caption names.
    """
    rng = np.random.default_rng((seed, index))
    place = None if rng.random() < 0.08 else list(PLACES)[rng.integers(len(PLACES))]
    scene, phrases = (plain, ("",)) if place is None else PLACES[place]
    image = scene(rng)
    phrase = phrases[0 if rng.random() < 0.7 else rng.integers(len(phrases))]
    kind = rng.random()
    if place is not None and kind < 0.04:
        return LabelledImage(image.reduce(2), f"a photo {phrase}", None, place)

    first = _subject(artwork, rng)
    if kind > 0.9:
        second = _subject(artwork, rng)
        # One on the left, one on the right; the caption names them in this order.
        for subject, x in ((first, rng.uniform(0.0, 0.12)), (second, rng.uniform(0.88, 1.0))):
            paste(image, subject.sprite, rng, size=(0.36, 0.5), x_range=(x, x))
        joint = "and" if rng.random() < 0.6 else "next to"
        described = f"{first.described} {joint} {with_article(second.described)}"
        return LabelledImage(image.reduce(2), caption(described, phrase, rng), first.noun, place, second.noun)

    described, size = first.described, USUAL_SIZE
    if rng.random() < 0.12:
        word = list(SIZES)[rng.integers(len(SIZES))]
        described, size = f"{word} {described}", SIZES[word]
    openings: tuple[str, ...] = OPENINGS
    if artwork.others and described == first.described and rng.random() < 0.06:
        openings, size = (CLOSE_VIEW,), CLOSE_SIZE
    paste(image, first.sprite, rng, size)
    return LabelledImage(image.reduce(2), caption(described, phrase, rng, openings), first.noun, place)


def _subject(artwork: Artwork, rng: Generator) -> Figure:
    """Choose a noun, or another thing of the wide world, one of its depictions and, at times, a colour or two."""
    names = artwork.others if artwork.others and rng.random() < 0.5 else artwork.sprites
    noun = list(names)[rng.integers(len(names))]
    sprite = names[noun][rng.integers(len(names[noun]))]
    if artwork.others:
        sprite = sprite.rotate(rng.normal(0, 8), Image.Resampling.BICUBIC, expand=True)
        if noun.split()[0] in COLOURS:
            return Figure(noun, sprite, noun)
        if rng.random() < 0.1:
            first, second = rng.permutation(list(COLOURS))[:2]
            colours = melting(sprite.size, COLOURS[first], COLOURS[second], rng)
            return Figure(noun, colourise(sprite, colours), f"{first} and {second} {noun}")
    if rng.random() >= 0.3:
        return Figure(noun, sprite, noun)
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    return Figure(noun, colourise(sprite, COLOURS[colour]), f"{colour} {noun}")


def paste(
    image: Image.Image,
    sprite: Image.Image,
    rng: Generator,
    size: tuple[float, float] = USUAL_SIZE,
    x_range: tuple[float, float] = (0.25, 0.75),
) -> None:
    """Put a sprite into a scene: random size, angle, mirror image, brightness, and a soft shadow.

    Args:
        size: range of the sprite's longer side, as a share of the image's.
        x_range: where it stands, from 0 (left edge) to 1 (right edge).
    """
    canvas = image.width
    factor = rng.uniform(*size) * canvas / max(sprite.size)
    sprite = sprite.resize([max(1, round(side * factor)) for side in sprite.size], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    alpha = sprite.getchannel("A")
    gain = rng.uniform(0.9, 1.08)
    sprite = sprite.convert("RGB").point(lambda value: min(255, int(value * gain)))

    # The subject stands in the lower half.
    width, height = sprite.size
    x = int((canvas - width) * rng.uniform(*x_range))
    y = int((canvas - height) * rng.uniform(0.45, 0.9))
    shadow = Image.new("L", image.size)
    shadow.paste(alpha.resize((width, max(1, height // 6))).point(lambda a: a // 3), (x, y + height - height // 8))
    image.paste((0, 0, 0), mask=shadow.filter(ImageFilter.BoxBlur(3 * canvas / CANVAS)))
    image.paste(sprite, (x, y), alpha)


def caption(described: str, phrase: str, rng: Generator, openings: tuple[str, ...] = OPENINGS) -> str:
    """Return the caption of what is seen: "a photo of a red car on the beach"."""
    opening = openings[0 if rng.random() < 0.4 else rng.integers(len(openings))]
    text = f"{opening.format(described)} {phrase}".strip()
    text = text.replace("a " + described, with_article(described))
    return text + ("." if rng.random() < 0.2 else "")


def with_article(noun: str) -> str:
    """Return "a car", "an owl", "jeans"."""
    if noun.split(" with ")[0].endswith("s") and not noun.endswith(("ss", "us", "is", "christmas")):
        return noun
    an = noun[0] in "aeiou" and not noun.startswith(("uni", "euro")) or noun.startswith(("hour", "x-"))
    return f"{'an' if an else 'a'} {noun}"


def all_prompts(number: int) -> list[str]:
    """Return `number` prompts "a <noun> <place>" in which every noun and every place comes equally often."""
    nouns, places = list(NOUNS), [phrases[0] for _, phrases in PLACES.values()]
    # One step of the place more in each round of the nouns, so that the pairs differ.
    pairs = [(nouns[i % len(nouns)], places[(i + i // len(nouns)) % len(places)]) for i in range(number)]
    return [f"{with_article(noun)} {place}" for noun, place in pairs]


def preview(artwork: Artwork, seed: int, number: int = 64) -> Image.Image:
    """Return a sheet of the first images of the world `seed` with their captions."""
    items = [render(artwork, seed, index) for index in range(number)]
    return captioned_grid([item.image for item in items], [item.caption for item in items], columns=8, scale=3)
