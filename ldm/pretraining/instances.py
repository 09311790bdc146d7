"""Thousands of figures, each in several surroundings: what the instance encoder learns from."""

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.errors import UserError
from ldm.pretraining.artwork import HELD_OUT, NOUNS, colourise, load_sprite
from ldm.pretraining.concepts import CONCEPTS
from ldm.pretraining.scenes import PLACES, plain
from ldm.pretraining.world import paste

VIEWS = 6  # pictures of each figure
FIGURES = 2  # of each artwork: in its own colours, and repainted
HOLD_OUT_EVERY = 12  # every twelfth artwork is kept for measuring


@dataclass(frozen=True)
class Instances:
    """Views (artworks, FIGURES, VIEWS, 64, 64, 3) uint8, for training and for measuring."""

    training: np.ndarray
    held_out: np.ndarray


def artworks(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the files of both packages for training, and those held out.

    Left out altogether: the drawings under the demo concepts (`CONCEPTS`), flags, signs, and skin tones,
    which differ too little. `HELD_OUT` and every twelfth of the others are held out.

    Raises:
        UserError: the artwork is not there.
    """
    files = [*sorted(Path(folder).glob("fluent/assets/*.webp")), *sorted(Path(folder).glob("noto/img/google/64/*.png"))]
    if not files:
        raise UserError(f"no artwork in {folder}: run 'bash scripts/fetch_artwork.sh {folder}' first (needs npm)")
    demo = {("webp", NOUNS[c.noun]) for c in CONCEPTS.values()}
    reserved = {code for _, code in HELD_OUT.values()}
    training, held_out = [], []
    for file in files:
        code = file.stem
        # A held-out figure's variants (the black cat of the cat) are held out with it.
        if any(code.startswith(other.removesuffix("-fe0f")) for other in reserved):
            held_out.append(file)
        elif _is_figure(code) and (file.suffix[1:], code) not in demo:
            group = held_out if int(code.split("-")[0], 16) % HOLD_OUT_EVERY == 0 else training
            group.append(file)
    return training, held_out


def _is_figure(code: str) -> bool:
    """Tell drawings of things from flags, letters and signs; a file name is its code points in hex."""
    points = [int(part, 16) for part in code.split("-")]
    toned = any(0x1F3FB <= point <= 0x1F3FF for point in points)
    first = points[0]
    return not toned and (0x1F300 <= first < 0x1F500 or 0x1F5FB <= first < 0x1F680 or first >= 0x1F680)


def repaint(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Give a sprite colours of its own: one, or two that melt into each other along some direction."""
    first, second = rng.uniform(20, 245, (2, 3))
    width, height = sprite.size
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    across = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) * rng.uniform(2, 6) + 0.5
    share = np.clip(across, 0, 1)[..., None] if rng.random() < 0.6 else 0
    return colourise(sprite, (1 - share) * first + share * second, rng.uniform(0.6, 0.95))


def render_views(file: Path, seed: int) -> np.ndarray:
    """Return the views (FIGURES, VIEWS, 64, 64, 3) of an artwork's figures."""
    rng = np.random.default_rng((seed, *file.as_posix()[-40:].encode()))
    sprite = load_sprite(file)
    views = []
    for figure in (sprite, repaint(sprite, rng)):
        for _ in range(VIEWS):
            scene = plain if rng.random() < 0.1 else list(PLACES.values())[rng.integers(len(PLACES))][0]
            picture = scene(rng)
            turned = figure.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
            paste(picture, turned, rng, size=(0.4, 0.9))
            views.append(np.asarray(picture.reduce(2)))
    return np.stack(views).reshape(FIGURES, VIEWS, 64, 64, 3)


def rendered_instances(seed: int, cache: Path, folder: Path) -> Instances:
    """Return all views, rendered at the first call and read from `cache` afterwards."""
    groups = {}
    for name, files in zip(("training", "held_out"), artworks(folder), strict=True):
        stem = cache / f"instances-{name}-{seed}"
        if not stem.with_suffix(".json").is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
                tasks = pool.imap(_render_task, [(file, seed) for file in files], chunksize=16)
                np.save(stem.with_suffix(".npy"), np.stack(list(tqdm(tasks, f"rendering {name}", len(files)))))
            stem.with_suffix(".json").write_text(json.dumps([file.name for file in files]))
        groups[name] = np.load(stem.with_suffix(".npy"), mmap_mode="r")
    return Instances(**groups)


def _render_task(task: tuple[Path, int]) -> np.ndarray:
    return render_views(*task)
