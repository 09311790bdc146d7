"""Sprites of the toy world: openly licensed emoji artwork from two registry packages.

Fluent 3D emoji (Microsoft, MIT; npm @lobehub/fluent-emoji-3d) and Noto emoji (Google, Apache-2.0;
npm emoji-datasource-google). `scripts/fetch_artwork.sh` puts both into a folder. They are needed
only to pretrain the embedded model, never to use it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ldm.errors import UserError
from ldm.pretraining.catalogue import read_catalogue

NOUNS = {
    "dog": "1f436",
    "cat": "1f431",
    "rabbit": "1f430",
    "penguin": "1f427",
    "frog": "1f438",
    "lion": "1f981",
    "panda": "1f43c",
    "fox": "1f98a",
    "owl": "1f989",
    "fish": "1f41f",
    "turtle": "1f422",
    "octopus": "1f419",
    "elephant": "1f418",
    "car": "1f697",
    "bus": "1f68c",
    "airplane": "2708-fe0f",
    "boat": "26f5",
    "rocket": "1f680",
    "house": "1f3e0",
    "apple": "1f34e",
    "strawberry": "1f353",
    "mushroom": "1f344",
    "robot": "1f916",
    "teapot": "1fad6",
    "monkey": "1f435",
    "pig": "1f437",
    "cow": "1f42e",
    "tiger": "1f42f",
    "bear": "1f43b",
    "chicken": "1f414",
    "duck": "1f986",
    "bee": "1f41d",
    "butterfly": "1f98b",
    "crab": "1f980",
    "whale": "1f433",
    "ghost": "1f47b",
    "snowman": "26c4",
    "truck": "1f69a",
    "train": "1f682",
    "tractor": "1f69c",
    "helicopter": "1f681",
    "tent": "26fa",
    "castle": "1f3f0",
    "balloon": "1f388",
    "umbrella": "2614",
    "guitar": "1f3b8",
    "clock": "23f0",
    "book": "1f4d5",
    "backpack": "1f392",
    "hat": "1f3a9",
    "shoe": "1f45f",
    "crown": "1f451",
    "cake": "1f370",
    "donut": "1f369",
    "pizza": "1f355",
    "burger": "1f354",
    "banana": "1f34c",
    "lemon": "1f34b",
    "pineapple": "1f34d",
    "watermelon": "1f349",
    "carrot": "1f955",
    "pumpkin": "1f383",
    "rose": "1f339",
    "sunflower": "1f33b",
}
"""Noun -> file name of its image in both packages (the emoji's code points)."""

HELD_OUT = {
    "poodle": ("dog", "1f429"),
    "cat-walking": ("cat", "1f408"),
    "rabbit-running": ("rabbit", "1f407"),
    "fish-tropical": ("fish", "1f420"),
    "car-suv": ("car", "1f699"),
    "trolleybus": ("bus", "1f68e"),
    "house-garden": ("house", "1f3e1"),
    "lorry": ("truck", "1f69b"),
    "speedboat": ("boat", "1f6a4"),
    "boot": ("shoe", "1f97e"),
    "cap": ("hat", "1f9e2"),
    "sunhat": ("hat", "1f452"),
    "clock-mantel": ("clock", "1f570-fe0f"),
    "teddy": ("bear", "1f9f8"),
    "cake-birthday": ("cake", "1f382"),
}
"""Artwork that neither the model nor the encoders are ever trained on, for concepts: (class noun, file name)."""

PAINTED = ("cat", "car", "teapot")
"""Nouns whose Fluent drawing is under a demo concept, in other colours; the wide world does without it."""

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 175, 70),
    "blue": (50, 100, 225),
    "purple": (145, 70, 200),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
    "black": (45, 45, 50),
    "brown": (140, 90, 50),
}
"""Colour word -> sRGB of its middle tone."""

SPRITE_SIZE = 128  # pixels, the longer side of a sprite as it is kept in memory


@dataclass(frozen=True)
class Artwork:
    """All sprites: noun -> its depictions, each an RGBA image cropped to its content."""

    sprites: dict[str, list[Image.Image]]
    others: dict[str, list[Image.Image]] = field(default_factory=dict)  # of the wide world: name -> drawings


def load_artwork(folder: str | Path, wide: bool = False) -> Artwork:
    """Read the sprites of every noun, and of the wide world if it is wanted.

    Args:
        folder: where `scripts/fetch_artwork.sh` put the packages (`fluent/`, `noto/`).

    Raises:
        UserError: a package is not there.
    """
    if wide:
        nouns, others = wide_drawings(folder)
        load = lambda group: {name: [load_sprite(file) for file in files] for name, files in group.items()}  # noqa: E731
        return Artwork(load(nouns), load(others))
    return Artwork({noun: load_depictions(folder, code) for noun, code in NOUNS.items()})


def wide_drawings(folder: str | Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the files of the wide world's drawings: those of the 64 nouns, and those of all other things.

    A drawing of `HELD_OUT` is left out in both packages, and with it its name where the name has no other
    drawing. Of the drawings painted for `PAINTED` the Fluent one, which they show, is left out.

    Raises:
        UserError: a package is not there.
    """
    nouns = {noun: depictions(folder, code) for noun, code in NOUNS.items()}
    for noun in PAINTED:
        nouns[noun] = nouns[noun][1:]
    others: dict[str, list[Path]] = {}
    for entry in read_catalogue(folder):
        if entry.code not in NOUNS.values() and not is_reserved(entry.code):
            others.setdefault(entry.name, []).extend(file for file in depictions(folder, entry.code) if file.is_file())
    return nouns, {name: files for name, files in others.items() if files}


def is_reserved(code: str) -> bool:
    """Return whether a file name is of `HELD_OUT`, or a variant of one: the black cat of the cat."""
    return any(code.startswith(other.removesuffix("-fe0f")) for _, other in HELD_OUT.values())


def depictions(folder: str | Path, code: str) -> list[Path]:
    """Return where the Fluent and the Noto drawing of a file name are."""
    return [Path(folder) / "fluent/assets" / f"{code}.webp", Path(folder) / "noto/img/google/64" / f"{code}.png"]


def load_depictions(folder: str | Path, code: str) -> list[Image.Image]:
    """Return the Fluent and the Noto sprite of one file name.

    Raises:
        UserError: one of them is not there.
    """
    files = depictions(folder, code)
    for file in files:
        if not file.is_file():
            raise UserError(f"no artwork {file}: run 'bash scripts/fetch_artwork.sh {folder}' first (needs npm)")
    return [load_sprite(file) for file in files]


def load_sprite(file: str | Path) -> Image.Image:
    """Return an RGBA image cropped to its content, its longer side SPRITE_SIZE pixels."""
    sprite = Image.open(file).convert("RGBA")
    sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = SPRITE_SIZE / max(sprite.size)
    return sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)


def melting(size: tuple[int, int], first: ArrayLike, second: ArrayLike, rng: np.random.Generator) -> np.ndarray:
    """Return colours (h, w, 3) for a sprite of a size (w, h): two that melt into each other along some direction."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    angle = rng.uniform(0, 2 * np.pi)
    across = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) * rng.uniform(2, 6) + 0.5
    share = np.clip(across, 0, 1)[..., None]
    return (1 - share) * np.asarray(first) + share * np.asarray(second)


def colourise(sprite: Image.Image, colour: tuple[int, int, int] | np.ndarray, strength: float = 0.8) -> Image.Image:
    """Tint an RGBA sprite: dark stays dark, light stays light, the middle takes the colour.

    Args:
        colour: sRGB, or an array (h, w, 3) that gives every pixel its own, for patterns.
        strength: 0 leaves the sprite as it is, 1 keeps nothing of its own hue.
    """
    rgba = np.asarray(sprite, dtype=np.float32)
    rgb, colour = rgba[..., :3], np.broadcast_to(np.asarray(colour, dtype=np.float32), rgba[..., :3].shape)
    # Stretch the luminance to the full range, so that every sprite keeps its drawing.
    luminance = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    low, high = np.percentile(luminance[rgba[..., 3] > 128], [3, 97])
    level = np.clip((luminance - low) / max(high - low, 1), 0, 1)[..., None]
    # Black -> colour -> white, the colour itself at 60 % brightness.
    tinted = np.where(level < 0.6, colour * (0.25 + 0.75 * level / 0.6), colour + (255 - colour) * (level - 0.6) / 0.5)
    out = rgb + strength * (np.clip(tinted, 0, 255) - rgb)
    return Image.fromarray(np.dstack([out, rgba[..., 3:]]).clip(0, 255).astype(np.uint8), "RGBA")
