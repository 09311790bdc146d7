"""Train one encoder, measure it on held-out images, and put both beside the embedded model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm import checkpoint
from ldm.autoencoder import AutoencoderKL
from ldm.diffusion import LatentDiffusion
from ldm.embedded_encoders import WorldCLIP, load_classifier, load_clip, load_instance_encoder, weights_of
from ldm.pretraining import encoders
from ldm.pretraining.accuracy import classifier_accuracy, clip_accuracy, instance_accuracy, to_inputs
from ldm.pretraining.artwork import NOUNS, load_sprite
from ldm.pretraining.cache import HELD_OUT_SEED, RenderedWorld, held_out_world, world_digest
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.instances import FigureDataset, artworks, held_out_views
from ldm.pretraining.loop import Finish
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.world import with_article

ROUND_TRIPS = 8_000  # images that the encoders also see as the autoencoder gives them back


class LabelledDataset(Dataset):
    """Images (3, 64, 64) uint8 with labels, and then the first of them as the autoencoder gives them back."""

    def __init__(self, images: np.ndarray, decoded: np.ndarray, *labels: Tensor):
        self.images, self.decoded, self.labels = images, decoded, labels

    def __len__(self) -> int:
        return len(self.images) + len(self.decoded)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        number = len(self.images)
        rows = [self.images[i] if i < number else self.decoded[i - number] for i in indices]
        which = torch.tensor([i % number for i in indices])
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2), *(label[which] for label in self.labels)

    @staticmethod
    def collate(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A fetched batch is whole already."""
        return batch


@torch.inference_mode()
def round_trips(autoencoder: AutoencoderKL, images: np.ndarray, file: Path) -> np.ndarray:
    """Return images (n, 64, 64, 3) uint8 as the autoencoder gives them back, cached in `file`."""
    if not file.is_file():
        chunks = []
        for start in range(0, len(images), 100):
            decoded = autoencoder.decode(autoencoder.encode(to_inputs(images[start : start + 100])).mean)
            chunks.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        np.save(file, np.concatenate(chunks))
    return np.load(file, mmap_mode="r")


def pretrain_encoder(
    config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path, finish: Finish
) -> None:
    """Train (or restore) the encoder `config.part`, measure it, and write its files into `config.encoders`."""
    module, dataset, measure = {"clip": _clip, "classifier": _classifier, "instance": _instance}[config.part](
        config, model, world, root
    )
    if config.warm_start:
        warm_start(module.network, root / config.encoders, config.part)
        module.averaged().load_state_dict(module.network.state_dict())
    finish(module, dataset, root / config.cache / config.name)
    encoder = module.averaged().eval().requires_grad_(False)
    save_encoder(encoder, module.network.config, root / config.encoders, config.part)
    file = root / config.encoders / "accuracy.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    before = record.get(config.part, {}).get("samples", 0) if config.warm_start else 0
    accuracy = measure(encoder) | {"samples": before + module.samples_seen}
    file.write_text(json.dumps(record | {config.part: accuracy}, indent=2) + "\n")
    print(f"{config.part} on held-out images: {accuracy}\nsaved {file.parent}")


def warm_start(encoder: nn.Module, folder: Path, name: str) -> None:
    """Put the present weights of an encoder into a new one; a CLIP of other words takes over those that both know.

    Raises:
        UserError: the present encoder is missing or does not fit.
    """
    loaders: dict[str, Callable[[Path], nn.Module]]
    loaders = {"clip": load_clip, "classifier": load_classifier, "instance": load_instance_encoder}
    present = loaders[name](folder)
    state = weights_of(present).state_dict()
    if isinstance(present, WorldCLIP) and isinstance(encoder, WorldCLIP):
        rows = encoder.clip.token_embedding.weight.detach().clone()
        known = [token for token in present.vocabulary if token in encoder.compact]
        rows[[encoder.compact[t] for t in known]] = state["token_embedding.weight"][[present.compact[t] for t in known]]
        state["token_embedding.weight"] = rows
    weights_of(encoder).load_state_dict(state)


def save_encoder(encoder: nn.Module, configs: dict[str, object], folder: Path, name: str) -> None:
    """Write NAME.safetensors (fp16) and its JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_weights(weights_of(encoder).state_dict(), folder / f"{name}.safetensors")
    for stem, content in configs.items():
        (folder / f"{stem}.json").write_text(json.dumps(content) + "\n")


def _decoded(config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path) -> np.ndarray:
    digest = world_digest(config.world, root / config.world.artwork)
    file = root / config.cache / f"round-trips-{config.world.seed}-{len(world.images)}-{digest}.npy"
    return round_trips(model.autoencoder, world.images[:ROUND_TRIPS], file)


def _clip(config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path) -> tuple:
    encoder = encoders.new_clip(world.captions)
    unique = {text: i for i, text in enumerate(dict.fromkeys(world.captions))}
    rows = encoder.tokenize(list(unique))
    ids = rows[torch.tensor([unique[text] for text in world.captions])]
    noun, place = _labels(world, list(NOUNS), list(PLACES))
    phrases = [phrases[0] for _, phrases in PLACES.values()]
    prompts = [f"a photo of {with_article(noun)} {phrase}" for noun in NOUNS for phrase in phrases]
    classes = encoder.tokenize(prompts).unflatten(0, (len(NOUNS), len(PLACES)))
    dataset = LabelledDataset(world.images, _decoded(config, model, world, root), ids, noun, place)
    measure = lambda trained: clip_accuracy(trained, held_out_world(config, root), list(NOUNS))  # noqa: E731
    return encoders.CLIPTraining(encoder, config, classes), dataset, measure


def _labels(world: RenderedWorld, nouns: list[str], places: list[str]) -> tuple[Tensor, Tensor]:
    """Positions (n,) of each image's noun and place; IGNORED where it has none, or "plain" where that is a place."""
    noun = torch.tensor([nouns.index(n) if n else encoders.IGNORED for n in world.nouns])
    plain = places.index("plain") if "plain" in places else encoders.IGNORED
    return noun, torch.tensor([places.index(p) if p else plain for p in world.places])


def _classifier(config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path) -> tuple:
    encoder = encoders.new_classifier()
    noun, place = _labels(world, encoder.nouns, encoder.places)
    dataset = LabelledDataset(world.images, _decoded(config, model, world, root), noun, place)
    measure = lambda trained: classifier_accuracy(trained, held_out_world(config, root))  # noqa: E731
    return encoders.ClassifierTraining(encoder, config), dataset, measure


def _instance(config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path) -> tuple:
    folder, cache = root / config.world.artwork, root / config.cache
    held_out = held_out_views(HELD_OUT_SEED, cache, folder)
    dataset = FigureDataset([load_sprite(file) for file in artworks(folder)[0]], config.seed)
    measure = lambda trained: instance_accuracy(trained, held_out)  # noqa: E731
    return encoders.InstanceTraining(encoders.new_instance_encoder(), config), dataset, measure
