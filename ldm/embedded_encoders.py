"""Encoders of images that need no hub: a small CLIP, an instance encoder, and a classifier.

All three take images (b, 3, h, w) in [-1, 1], RGB; what is not 64 x 64 is resized with antialiasing.
They were trained on the toy world (`ldm/pretraining/encoders.py`) and know nothing else; how well each
does on held-out images is in `data/tiny/encoders/accuracy.json`.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from ldm import tokenizer
from ldm.checkpoint import read_safetensors
from ldm.errors import UserError
from ldm.shipped import ROOT

ENCODERS = ROOT / "data/tiny/encoders"
SIZE = 64  # pixels
PAD, UNKNOWN = 0, 1  # compact token ids before those of the vocabulary


class WorldCLIP(nn.Module):
    """open_clip's CLIP over the few tokens that the world's captions use (CLIP-T, CLIP-I).

    Args:
        config: an open_clip model configuration (embed_dim, vision_cfg, text_cfg).
        vocabulary: CLIP token ids in ascending order; compact ids are 2, 3, ... in the same order.
    """

    config: dict[str, Any]  # its JSON files by their stems; a new encoder has them, one that was loaded has not

    def __init__(self, config: dict, vocabulary: list[int]):
        super().__init__()
        self.clip = CLIP(**config)
        self.vocabulary = vocabulary
        self.compact = {token: i + 2 for i, token in enumerate(vocabulary)}

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where token ids are made."""
        return self.clip.positional_embedding.device

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> compact ids (b, l); other tokens are UNKNOWN, the end token has the highest id."""
        rows = []
        for prompt in prompts:
            ids = tokenizer.tokenize(prompt.lower().strip())[: self.clip.context_length - 2]
            ids = [self.compact.get(i, UNKNOWN) for i in (tokenizer.START, *ids, tokenizer.END)]
            rows.append(ids + [PAD] * (self.clip.context_length - len(ids)))
        return torch.tensor(rows, device=self.device)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [-1, 1] -> unit vectors (b, d)."""
        return self.clip.encode_image(resized(images), normalize=True)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Prompts -> unit vectors (b, d)."""
        return self.clip.encode_text(self.tokenize(prompts), normalize=True)


class InstanceEncoder(nn.Module):
    """Distinguishes this cat from that cat, wherever it stands (the role of DINO in DINO-I)."""

    config: dict[str, Any]  # as of WorldCLIP

    def __init__(self, config: dict):
        super().__init__()
        self.trunk = ModifiedResNet(**config)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [-1, 1] -> unit vectors (b, d)."""
        return F.normalize(self.trunk(resized(images)), dim=-1)


class Classifier(nn.Module):
    """Names the noun and the place that an image shows.

    Args:
        nouns: the words of the noun logits, in their order.
        places: the words of the place logits; "plain" is a background without a place.
    """

    config: dict[str, Any]  # as of WorldCLIP

    def __init__(self, config: dict, nouns: list[str], places: list[str]):
        super().__init__()
        self.trunk = ModifiedResNet(output_dim=len(nouns) + len(places), **config)
        self.nouns, self.places = nouns, places

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, h, w) in [-1, 1] -> logits of nouns (b, n) and of places (b, p)."""
        return self.trunk(resized(images)).split([len(self.nouns), len(self.places)], dim=-1)


def resized(images: Tensor) -> Tensor:
    """Bring images to the encoders' 64 x 64 pixels."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def load_clip(folder: str | Path = ENCODERS) -> WorldCLIP:
    """Return the small CLIP, frozen, on the CPU. Raises UserError: its files are missing or broken."""
    return _load(WorldCLIP(_read(folder, "clip"), _read(folder, "clip-vocabulary")), folder, "clip")


def load_instance_encoder(folder: str | Path = ENCODERS) -> InstanceEncoder:
    """Return the instance encoder, frozen, on the CPU. Raises UserError: its files are missing or broken."""
    return _load(InstanceEncoder(_read(folder, "instance")), folder, "instance")


def load_classifier(folder: str | Path = ENCODERS) -> Classifier:
    """Return the classifier, frozen, on the CPU. Raises UserError: its files are missing or broken."""
    return _load(Classifier(**_read(folder, "classifier")), folder, "classifier")


def weights_of(encoder: Any) -> nn.Module:
    """Return the part of an encoder whose state dict is stored: open_clip's own module."""
    return encoder.clip if isinstance(encoder, WorldCLIP) else encoder.trunk


Encoder = TypeVar("Encoder", bound=nn.Module)


def _read(folder: str | Path, name: str) -> Any:
    file = Path(folder) / f"{name}.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no encoder at {file}: expected its configuration (data/tiny/encoders has them)") from error


def _load(encoder: Encoder, folder: str | Path, name: str) -> Encoder:
    file = Path(folder) / f"{name}.safetensors"
    try:
        weights_of(encoder).load_state_dict(read_safetensors(file)[0])
    except RuntimeError as error:
        raise UserError(f"{file} does not fit {name}.json beside it: {str(error).splitlines()[-1].strip()}") from error
    return encoder.eval().requires_grad_(False)
