"""Rendered pictures and their captions on disk, made once by all cores."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.pretraining.artwork import load_artwork
from ldm.pretraining.config import WorldConfig
from ldm.pretraining.world import render

CHUNK = 500  # pictures rendered per task


def rendered_world(config: WorldConfig, cache: Path, artwork: Path) -> tuple[np.ndarray, list[str]]:
    """Return the world's pictures (n, 64, 64, 3) uint8, memory-mapped, and their captions.

    They are rendered at the first call and read from `cache` afterwards.
    """
    stem = f"world-{config.seed}-{config.pictures}"
    pictures, captions = cache / f"{stem}.npy", cache / f"{stem}.json"
    if not captions.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _render_all(config, artwork, pictures, captions)
    return np.load(pictures, mmap_mode="r"), json.loads(captions.read_text())


def _render_all(config: WorldConfig, artwork: Path, pictures: Path, captions: Path) -> None:
    starts = range(0, config.pictures, CHUNK)
    tasks = [(artwork, config.seed, start, min(start + CHUNK, config.pictures)) for start in starts]
    out = np.lib.format.open_memmap(pictures, "w+", np.uint8, (config.pictures, 64, 64, 3))
    texts = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        results = pool.imap(_render_chunk, tasks)
        for start, (chunk, chunk_texts) in zip(starts, tqdm(results, "rendering", len(tasks)), strict=True):
            out[start : start + len(chunk)] = chunk
            texts += chunk_texts
    out.flush()
    captions.write_text(json.dumps(texts))  # written last: its presence says that the pictures are whole


def _render_chunk(task: tuple) -> tuple[np.ndarray, list[str]]:
    folder, seed, start, stop = task
    artwork = load_artwork(folder)
    items = [render(artwork, seed, index) for index in range(start, stop)]
    return np.stack([np.asarray(item.picture) for item in items]), [item.caption for item in items]
