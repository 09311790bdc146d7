"""What the embedded encoders get right on images that nothing was trained on."""

import numpy as np
import torch
from torch import Tensor

from ldm.embedded_encoders import Classifier, InstanceEncoder, WorldCLIP
from ldm.pretraining.cache import RenderedWorld
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import with_article

BATCH = 250


def to_inputs(images: np.ndarray) -> Tensor:
    """Images (n, h, w, 3) uint8 -> (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _in_batches(function, images: np.ndarray) -> Tensor:
    chunks = [function(to_inputs(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
    return torch.cat(chunks)


@torch.inference_mode()
def classifier_accuracy(encoder: Classifier, world: RenderedWorld) -> dict[str, float | int]:
    """Share of images whose noun and whose place have the highest logit; images with two nouns count for places."""
    logits = _in_batches(lambda x: torch.cat(encoder.logits(x), dim=-1), world.images)
    nouns, places = logits.split([len(encoder.nouns), len(encoder.places)], dim=-1)
    right = [encoder.nouns[i] == noun for i, noun in zip(nouns.argmax(-1), world.nouns, strict=True) if noun]
    placed = [encoder.places[i] == (place or "plain") for i, place in zip(places.argmax(-1), world.places, strict=True)]
    return {"noun": float(np.mean(right)), "place": float(np.mean(placed)), "images": len(placed)}


@torch.inference_mode()
def clip_accuracy(encoder: WorldCLIP, world: RenderedWorld, nouns: list[str], seed: int = 0) -> dict[str, float | int]:
    """Zero-shot accuracy of nouns and places, and how often an image finds its caption among 100 different ones.

    As in Radford et al. 2021, a class is the mean of several prompts' features: a noun in all places (and
    none), a place with all nouns. `noun_in_place` asks for the noun with the right place in every prompt.
    """
    image = _in_batches(encoder.image_features, world.images)
    phrases = {place: phrases[0] for place, (_, phrases) in PLACES.items()}
    prompts = [f"a photo of {with_article(noun)} {phrase}".strip() for noun in nouns for phrase in (*phrases.values(), "")]
    text = encoder.text_features(prompts).unflatten(0, (len(nouns), -1))
    noun_text, place_text = text.mean(1), text.mean(0)[:-1]
    noun_text, place_text = (features / features.norm(dim=-1, keepdim=True) for features in (noun_text, place_text))
    single = [i for i, noun in enumerate(world.nouns) if noun]
    placed = [i for i, place in enumerate(world.places) if place]
    noun_right = [nouns[k] == world.nouns[i] for i, k in zip(single, (image[single] @ noun_text.T).argmax(-1), strict=True)]
    own = torch.tensor([[*phrases, None].index(world.places[i]) for i in single])
    asked = torch.einsum("id,nid->in", image[single], text[:, own]).argmax(-1)
    in_place_right = [nouns[k] == world.nouns[i] for i, k in zip(single, asked, strict=True)]
    best = (image[placed] @ place_text.T).argmax(-1)
    place_right = [list(phrases)[k] == world.places[i] for i, k in zip(placed, best, strict=True)]
    rng, found = np.random.default_rng(seed), []
    first = {text: i for i, text in enumerate(world.captions)}
    for _ in range(10):
        texts = rng.choice(list(first), 100, replace=False)
        scores = image[[first[text] for text in texts]] @ encoder.text_features(list(texts)).T
        found.append((scores.argmax(-1) == torch.arange(100)).float().mean().item())
    means = {
        "noun": np.mean(noun_right),
        "noun_in_place": np.mean(in_place_right),
        "place": np.mean(place_right),
        "caption_of_100": np.mean(found),
    }
    return {name: float(value) for name, value in means.items()} | {"images": len(world.captions)}


@torch.inference_mode()
def instance_accuracy(encoder: InstanceEncoder, views: np.ndarray, seed: int = 0) -> dict[str, float | int]:
    """How often a view is nearest to another view of the same figure.

    Args:
        views: (artworks, figures, views, 64, 64, 3) of held-out figures.

    Returns:
        `of_100`: among 100 figures drawn at random; `of_all`: among all; `recoloured`: among the figures
        of the same artwork, which differ by colour alone.
    """
    artworks, figures, number = views.shape[:3]
    features = _in_batches(encoder.image_features, views.reshape(-1, *views.shape[3:])).unflatten(0, (-1, number))
    gallery, query = features[:, 0], features[:, 1]
    scores = query @ gallery.T
    own = scores.diagonal()[:, None]
    rng, of_100 = np.random.default_rng(seed), []
    for _ in range(20):
        chosen = rng.choice(len(gallery), min(100, len(gallery)), replace=False)
        block = scores[chosen][:, chosen]
        of_100.append((block.argmax(-1) == torch.arange(len(chosen))).float().mean().item())
    artwork = torch.arange(len(gallery)) // figures
    same = artwork[:, None] == artwork[None]
    recoloured = (scores.masked_fill(~same, -2) <= own).all(-1).float().mean().item()
    return {
        "of_100": float(np.mean(of_100)),
        "of_all": (scores <= own).all(-1).float().mean().item(),
        "recoloured": recoloured,
        "figures": artworks * figures,
    }
