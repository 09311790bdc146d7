"""Thousands of figures, each in several surroundings: what the instance encoder learns from."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.errors import UserError
from ldm.pretraining.artwork import NOUNS, colourise, is_reserved, load_sprite, melting
from ldm.pretraining.concepts import CONCEPTS
from ldm.pretraining.scenes import PLACES, plain
from ldm.pretraining.world import paste

VIEWS = 6  # images of each held-out figure
FIGURES = 2  # of each artwork: in its own colours, and repainted
HOLD_OUT_EVERY = 12  # every twelfth artwork is kept for measuring


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
    training: list[Path] = []
    held_out: list[Path] = []
    for file in files:
        code = file.stem
        # A held-out figure's variants (the black cat of the cat) are held out with it.
        if is_reserved(code):
            held_out.append(file)
        elif _is_figure(code) and (file.suffix[1:], code) not in demo:
            group = held_out if int(code.split("-")[0], 16) % HOLD_OUT_EVERY == 0 else training
            group.append(file)
    return training, held_out


def _is_figure(code: str) -> bool:
    """Distinguish drawings of things from flags, letters and signs; a file name is its code points in hex."""
    points = [int(part, 16) for part in code.split("-")]
    toned = any(0x1F3FB <= point <= 0x1F3FF for point in points)
    first = points[0]
    return not toned and (0x1F300 <= first < 0x1F500 or 0x1F5FB <= first < 0x1F680 or first >= 0x1F680)


def repaint(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Give a sprite colours of its own: one, or two that melt into each other along some direction."""
    first, second = rng.uniform(20, 245, (2, 3))
    colours = melting(sprite.size, first, second, rng) if rng.random() < 0.6 else first
    return colourise(sprite, colours, rng.uniform(0.6, 0.95))


def render_views(file: Path, seed: int) -> np.ndarray:
    """Return the views (FIGURES, VIEWS, 64, 64, 3) of an artwork's figures."""
    rng = np.random.default_rng((seed, *file.as_posix()[-40:].encode()))
    sprite = load_sprite(file)
    views = []
    for figure in (sprite, repaint(sprite, rng)):
        for _ in range(VIEWS):
            scene = plain if rng.random() < 0.1 else list(PLACES.values())[rng.integers(len(PLACES))][0]
            views.append(np.asarray(_view(figure, scene(rng), rng).reduce(2)))
    return np.stack(views).reshape(FIGURES, VIEWS, 64, 64, 3)


def held_out_views(seed: int, cache: Path, folder: Path) -> np.ndarray:
    """Return the views (artworks, FIGURES, VIEWS, 64, 64, 3) uint8 that measure the instance encoder.

    They are rendered at the first call and read from `cache` afterwards.
    """
    files = artworks(folder)[1]
    digest = hashlib.sha256(json.dumps([file.name for file in files]).encode()).hexdigest()[:6]
    stored = cache / f"instances-held-out-{seed}-{digest}.npy"
    if not stored.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        views = np.stack([render_views(file, seed) for file in tqdm(files, "rendering held-out figures")])
        partial = stored.with_suffix(".partial.npy")
        np.save(partial, views)
        partial.rename(stored)
    return np.load(stored, mmap_mode="r")


class FigureDataset(Dataset):
    """Artworks for training; a batch holds their figures, two new views of each: (b * FIGURES, 2, 3, 64, 64) uint8.

    Views are rendered when they are asked for, at half the world's size, on scenes rendered once: half a
    millisecond each, so that nothing needs to be cached and no view comes twice.
    """

    def __init__(self, sprites: list[Image.Image], seed: int, scenes: int = 600):
        self.sprites = [sprite.reduce(2) for sprite in sprites]
        rng = np.random.default_rng(seed)
        places = [scene for scene, _ in PLACES.values()] + [plain, plain]
        self.scenes = [places[i % len(places)](rng).reduce(2) for i in range(scenes)]

    def __len__(self) -> int:
        return len(self.sprites)

    def __getitems__(self, indices: list[int]) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # follows the training's seed
        figures = [figure for i in indices for figure in (self.sprites[i], repaint(self.sprites[i], rng))]
        views = np.stack([[self._render_view(figure, rng) for _ in range(2)] for figure in figures])
        return torch.from_numpy(views).permute(0, 1, 4, 2, 3)

    def _render_view(self, figure: Image.Image, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(_view(figure, self.scenes[rng.integers(len(self.scenes))].copy(), rng))

    @staticmethod
    def collate(batch: Tensor) -> Tensor:
        """A fetched batch is whole already."""
        return batch


def _view(figure: Image.Image, scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    turned = figure.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    paste(scene, turned, rng, size=(0.4, 0.9))
    return scene
