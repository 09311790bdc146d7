"""How often the base model generates what a prompt asks for, as the classifier sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoint import save_weights
from ldm.diffusion import LatentDiffusion
from ldm.embedded_encoders import Classifier
from ldm.images import read_image
from ldm.pretraining.artwork import NOUNS
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import with_article
from ldm.shipped import ROOT
from ldm.text_to_image import SamplingOptions, text_to_image

HELD_OUT_SHEET = ROOT / "data/tiny/held-out.webp"


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt and what its images ought to show."""

    prompt: str
    noun: str
    place: str


def labelled_prompts(number: int, seed: int) -> list[LabelledPrompt]:
    """Return `number` different prompts "a <noun> <place>": every noun equally often (or once more), in random places.

    At most as many as there are pairs of a noun and a place.
    """
    rng = np.random.default_rng(seed)
    places = {noun: rng.permutation(list(PLACES)).tolist() for noun in rng.permutation(list(NOUNS)).tolist()}
    pairs = [(noun, own[turn]) for turn in range(len(PLACES)) for noun, own in places.items()][:number]
    return [LabelledPrompt(f"{with_article(noun)} {PLACES[place][1][0]}", noun, place) for noun, place in sorted(pairs)]


def generate_images(
    model: LatentDiffusion,
    prompts: list[str],
    images: int,
    options: SamplingOptions,
    batch_size: int,
    progress: Callable[[int], None],
    folder: Path | None = None,
) -> Tensor:
    """Return so many images of every prompt: (prompts * images, 3, h, w) uint8, on the CPU.

    Image j of prompt i starts from noise number i * images + j of the seed, whatever the batch size.

    Args:
        folder: where each batch is kept, to go on from after an interruption; None keeps nothing.
    """
    generated, total = [], len(prompts) * images
    for start in range(0, total, batch_size):
        rows = list(range(start, min(start + batch_size, total)))
        file = folder and folder / f"{start:06}-{len(rows)}.safetensors"
        if file and (kept := _kept(file, len(rows))) is not None:
            generated.append(kept)
        else:
            pixels = text_to_image(model, [prompts[row // images] for row in rows], rows, options)
            generated.append(((pixels + 1) * 127.5).round().byte().cpu())
            if file:
                save_weights({"images": generated[-1]}, file)
        progress(len(rows))
    return torch.cat(generated)


def _kept(file: Path, number: int) -> Tensor | None:
    """A batch that an earlier run kept; None: there is none, or the file holds something else and is made again."""
    try:
        images = load_file(file).get("images") if file.is_file() else None
    except (OSError, SafetensorError):
        return None
    return images if images is not None and len(images) == number else None


def held_out_images() -> np.ndarray:
    """Return the first 256 images of the held-out world, which nothing is trained on: (256, 64, 64, 3) uint8.

    They are shipped, so that measuring needs no artwork; `render(artwork, HELD_OUT_SEED, i)` renders them again.
    """
    sheet = np.asarray(read_image(HELD_OUT_SHEET))
    return rearrange(sheet, "(r h) (c w) d -> (r c) h w d", h=64, w=64)


@torch.inference_mode()
def classify(classifier: Classifier, prompts: list[LabelledPrompt], images: Tensor) -> dict:
    """Return the shares of images with the right place, noun and both, in all and by noun and place.

    Args:
        images: (prompts * images, 3, h, w) uint8, the images of a prompt side by side.
    """
    logits = [classifier.logits(part.float() / 127.5 - 1) for part in images.split(200)]
    nouns, places = (torch.cat(part).argmax(-1).unflatten(0, (len(prompts), -1)) for part in zip(*logits, strict=True))
    noun = nouns == torch.tensor([classifier.nouns.index(p.noun) for p in prompts])[:, None]
    place = places == torch.tensor([classifier.places.index(p.place) for p in prompts])[:, None]

    def by(name: str, right: Tensor) -> dict[str, float]:
        values = sorted({getattr(p, name) for p in prompts})
        return {v: right[[getattr(p, name) == v for p in prompts]].float().mean().item() for v in values}

    return {
        "place_right": place.float().mean().item(),
        "noun_right": noun.float().mean().item(),
        "both_right": (noun & place).float().mean().item(),
        "noun_right_by_noun": by("noun", noun),
        "place_right_by_place": by("place", place),
        "prompts": [
            {"prompt": prompt.prompt, "noun": n.float().mean().item(), "place": p.float().mean().item()}
            for prompt, n, p in zip(prompts, noun, place, strict=True)
        ],
        "named": [classifier.nouns[i] for i in nouns[:, 0]],  # what the first image of each prompt was taken for
    }
