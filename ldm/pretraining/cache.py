"""Rendered images and their captions on disk, made once by all cores."""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.pretraining.artwork import NOUNS, Artwork, load_artwork, wide_drawings
from ldm.pretraining.config import PretrainConfig, WorldConfig
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import render

HELD_OUT_SEED, HELD_OUT_IMAGES = 1, 4000  # the world that everything is measured on
CHUNK = 500  # images rendered per task


@dataclass(frozen=True)
class RenderedWorld:
    """Images (n, 64, 64, 3) uint8, memory-mapped, their captions, and what each shows."""

    images: np.ndarray
    captions: list[str]
    nouns: list[str | None]  # None: no subject, or two
    places: list[str | None]  # None: a plain background


def rendered_world(config: WorldConfig, cache: Path, artwork: Path) -> RenderedWorld:
    """Return the world's images; they are rendered at the first call and read from `cache` afterwards."""
    stem = f"world-{config.seed}-{config.images}-{world_digest(config, artwork)}"
    images, captions = cache / f"{stem}.npy", cache / f"{stem}.json"
    if not captions.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _render_all(config, artwork, images, captions)
    return RenderedWorld(np.load(images, mmap_mode="r"), **json.loads(captions.read_text()))


def held_out_world(config: PretrainConfig, root: Path) -> RenderedWorld:
    """Return images of another world seed, which nothing is trained on."""
    world = dataclasses.replace(config.world, seed=HELD_OUT_SEED, images=HELD_OUT_IMAGES)
    return rendered_world(world, root / config.cache, root / world.artwork)


def world_digest(config: WorldConfig, artwork: Path) -> str:
    """Return 6 hex digits of what the world shows, so that images of another one are never taken."""
    content: list = [NOUNS, [phrases for _, phrases in PLACES.values()]]
    if config.wide:
        content += [
            {name: [file.name for file in files] for name, files in group.items()} for group in wide_drawings(artwork)
        ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:6]


def _render_all(config: WorldConfig, artwork: Path, images: Path, captions: Path) -> None:
    starts = range(0, config.images, CHUNK)
    tasks = [(artwork, config.wide, config.seed, start, min(start + CHUNK, config.images)) for start in starts]
    out = np.lib.format.open_memmap(images, "w+", np.uint8, (config.images, 64, 64, 3))
    labels_of_all: dict[str, list] = {"captions": [], "nouns": [], "places": []}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        results = pool.imap(_render_chunk, tasks)
        for start, (chunk, labels) in zip(starts, tqdm(results, "rendering", len(tasks)), strict=True):
            out[start : start + len(chunk)] = chunk
            for name, values in labels.items():
                labels_of_all[name] += values
    out.flush()
    captions.write_text(json.dumps(labels_of_all))  # written last: its presence says that the images are whole


@functools.lru_cache(maxsize=1)
def _artwork(folder: Path, wide: bool) -> Artwork:
    return load_artwork(folder, wide)


def _render_chunk(task: tuple) -> tuple[np.ndarray, dict[str, list]]:
    folder, wide, seed, start, stop = task
    artwork = _artwork(folder, wide)
    items = [render(artwork, seed, index) for index in range(start, stop)]
    labels: dict[str, list] = {
        "captions": [item.caption for item in items],
        "nouns": [None if item.second or item.noun not in NOUNS else item.noun for item in items],
        "places": [item.place for item in items],
    }
    return np.stack([np.asarray(item.image) for item in items]), labels
