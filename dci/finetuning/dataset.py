"""Reference and regularization images, as cached latents or as pixels, and their batches.

All randomness of a training step is a function of (seed, step, slot), where a slot is a place in
the step's batch over all processes. So a step is the same in a resumed run, on any number of
processes and in any number of micro-batches, and no generator's state has to be kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from dci.finetuning import distributed
from dci.finetuning.augmentation import Placement
from dci.finetuning.config import DataConfig
from dci.finetuning.images import TrainingImage
from dci.finetuning.masks import latent_weights
from ldm import tokenizer
from ldm.conditioning import ImageSize
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.runtime.device_memory import upload
from ldm.tokenizer import tokenize

REGULARIZATION = -1  # in place of a reference image's index


class BatchSlot(NamedTuple):
    """One place of a step's batch."""

    item: int  # in the dataset
    step: int
    slot: int  # of the step's batch over all processes


@dataclass(frozen=True)
class ConceptBatch:
    """Images of one training step, or of a part of it, with all that is random about them.

    The rows of `pixels` come first, those of `moments` behind them.
    """

    images: list[int]  # index of each reference image, or REGULARIZATION
    caption_prefix: list[str]  # for the front of each reference image's prompt; may be empty
    caption_ids: Tensor  # (b, 77); read only for regularization images
    pixels: Tensor  # images to be encoded (m, 3, H, W)
    moments: Tensor  # posterior mean and log-variance of the others (b - m, 2 c, h, w)
    weights: Tensor | None  # of the loss (b, 1, h, w); None: every cell counts
    t: Tensor  # timesteps (b,)
    noise: Tensor  # N(0, 1) (b, c, h, w)
    posterior_noise: Tensor  # N(0, 1) (b, c, h, w)
    sizes: Tensor | None = None  # image sizes that a model is conditioned on (b, 6), see `ldm.conditioning.ImageSize`
    share: float = 1.0  # of the micro-batch that these images are: the others are of another shape

    def to(self, device: torch.device) -> "ConceptBatch":
        """Return a copy of the batch on a device; copies to a GPU are asynchronous."""
        return replace(
            self,
            caption_ids=upload(self.caption_ids, device),
            pixels=upload(self.pixels, device),
            moments=upload(self.moments, device),
            weights=None if self.weights is None else upload(self.weights, device),
            t=upload(self.t, device),
            noise=upload(self.noise, device),
            posterior_noise=upload(self.posterior_noise, device),
            sizes=None if self.sizes is None else upload(self.sizes, device),
        )


class ConceptDataset(Dataset):
    """All images of a run: first the reference images, then the regularization images."""

    def __init__(
        self,
        model: LatentDiffusion,
        references: list[TrainingImage],
        regularization: list[TrainingImage],
        config: DataConfig,
        seed: int = 0,
    ):
        """Encode once what the augmentation leaves alone.

        Raises:
            UserError: cached latents are asked for, but the augmentation changes the images.
        """
        if config.augment != "none" and config.cache_latents:
            raise UserError(
                f"data.cache_latents=true does not go with data.augment={config.augment}, "
                "which changes the images in every step: leave one out"
            )
        self.config, self.seed = config, seed
        self.images = [*references, *regularization]
        self.references = len(references)
        self.size = model.config.image_size
        self.downsampling = model.config.autoencoder.downsampling
        self.latent_shape = model.latent_shape(self.size, self.size)
        self.timesteps = len(model.alphas_cumprod)
        self.masked = config.augment != "none" or any(image.mask is not None for image in references)
        captions = [tokenizer.frame(tokenize(image.caption)) for image in self.images]
        self.caption_ids = torch.tensor(captions)

        cached = [i for i in range(len(self.images)) if self._is_cached(i)]
        self.row = {item: row for row, item in enumerate(cached)}  # of each cached image
        shape = (2 * self.latent_shape[0], *self.latent_shape[1:])
        moments = encode(model, [self.images[item].pixels for item in cached])
        alike = len({rows.shape for rows in moments}) == 1
        self.moments = torch.stack(moments) if alike else moments or torch.empty(0, 2, *shape)

    def describe(self) -> str:
        """Return in one line what is cached and what is not."""
        if len(self.row) == len(self.images):
            return f"Latents: cached, {len(self.row)} images and their mirror images encoded once"
        why = f"data.augment={self.config.augment} changes them" if self.config.augment != "none" else "as asked for"
        rest = f"; the {len(self.row)} regularization images are cached" if self.row else ""
        return f"Latents: {len(self.images) - len(self.row)} images are encoded anew in every step ({why}){rest}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, parts: list[list[BatchSlot]]) -> list[ConceptBatch]:
        """A process's share of a step, in micro-batches; images of different shapes lie in batches of their own."""
        return [self._batch(slots, len(slots) / len(part)) for part in parts for slots in self._by_shape(part)]

    def _by_shape(self, part: list[BatchSlot]) -> list[list[BatchSlot]]:
        groups: dict[tuple[int, ...], list[BatchSlot]] = {}
        for slot in part:
            groups.setdefault(self._shape(slot.item), []).append(slot)
        return [*groups.values()]

    def _shape(self, item: int) -> tuple[int, int]:
        """Height and width of an image as it goes into a batch."""
        placed = item < self.references and self.config.augment != "none"
        height, width = self.images[item].pixels.shape[-2:]
        return (self.size, self.size) if placed else (height, width)

    def _latent_shape(self, item: int) -> tuple[int, int, int]:
        height, width = (side // self.downsampling for side in self._shape(item))
        return self.latent_shape[0], height, width

    def _size_condition(self, item: int) -> Tensor:
        shape, size = self._shape(item), self.images[item].size
        return (size if size is not None and size.target == shape else ImageSize(shape, (0, 0), shape)).row()

    def _batch(self, slots: list[BatchSlot], share: float = 1.0) -> ConceptBatch:
        slots = sorted(slots, key=lambda slot: slot.item in self.row)  # pixels first
        rows = [self._row(slot) for slot in slots]
        shape = self._latent_shape(slots[0].item)

        def stack(name: str, shape: tuple[int, ...]) -> Tensor:
            tensors = [row[name] for row in rows if name in row]
            return torch.stack(tensors) if tensors else torch.empty(0, *shape)

        channels, *cells = shape
        return ConceptBatch(
            images=[slot.item if slot.item < self.references else REGULARIZATION for slot in slots],
            caption_prefix=[row["caption_prefix"] for row in rows],
            caption_ids=self.caption_ids[[slot.item for slot in slots]],
            pixels=stack("pixels", (3, *self._shape(slots[0].item))),
            moments=stack("moments", (2 * channels, *cells)),
            weights=stack("weights", (1, *cells)) if self.masked else None,
            t=torch.tensor([row["t"] for row in rows]),
            noise=stack("noise", shape),
            posterior_noise=stack("posterior_noise", shape),
            sizes=torch.cat([self._size_condition(slot.item) for slot in slots]),
            share=share,
        )

    def _is_cached(self, item: int) -> bool:
        changed = item < self.references and self.config.augment != "none"
        return not changed and self.config.cache_latents is not False

    def _row(self, slot: BatchSlot) -> dict:
        """One image of a batch and everything random about it."""
        seeds = np.random.SeedSequence((self.seed, slot.step, slot.slot))
        random = np.random.default_rng(seeds)
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        shape = self._latent_shape(slot.item)
        row = {
            "t": int(random.integers(self.timesteps)),
            "noise": torch.randn(shape, generator=generator),
            "posterior_noise": torch.randn(shape, generator=generator),
            "caption_prefix": "",
        }
        mirrored = bool(self.config.flip and random.random() < 0.5)
        image = self.images[slot.item]
        flip = (lambda tensor: tensor.flip(-1)) if mirrored else (lambda tensor: tensor)
        mask = flip(torch.ones(1, *self._shape(slot.item)) if image.mask is None else image.mask)
        if slot.item in self.row:
            row["moments"] = self.moments[self.row[slot.item]][int(mirrored)]
        elif slot.item < self.references and self.config.augment == "random-resize":
            placement = Placement.sample(random, self.size)
            row["caption_prefix"] = placement.caption_prefix
            row["pixels"] = placement.place(flip(image.pixels), self.size).clamp(-1, 1)
            mask = mask if image.mask is None else placement.place(mask, self.size).clamp(0, 1)
            valid = placement.valid(self.size, self.downsampling)
            row["weights"] = valid * latent_weights(mask, self.downsampling, self.config.background_weight)
        else:
            row["pixels"] = flip(image.pixels)
        if self.masked and "weights" not in row:
            row["weights"] = latent_weights(mask, self.downsampling, self.config.background_weight)
        return row


class BatchOrder(Sampler):
    """Which images a process sees in which step.

    Batches are half reference and half regularization images, or references alone. Each half goes
    through its images in random order, all of them before any comes again.
    """

    def __init__(
        self,
        references: int,
        others: int,
        batch_size: int,  # of a step, over all processes
        steps: range,  # the steps that are to be made
        seed: int = 0,
        process: tuple[int, int] = (0, 1),  # this one's rank, and how many there are
        micro_batches: int = 1,  # parts in which a process takes its share of a step
    ):
        """Raises UserError where the batch cannot be shared out evenly."""
        share = batch_size // 2 if others else 0
        if others and not share:
            raise UserError("training.batch_size=1 leaves no room for regularization images: give 2 or more")
        parts = process[1] * micro_batches
        if batch_size % parts:
            raise UserError(
                f"training.batch_size={batch_size} cannot be shared evenly by {process[1]} processes with "
                f"{micro_batches} micro-batches each: give a multiple of {parts}"
            )
        self.steps, self.seed, self.process, self.micro_batches = steps, seed, process, micro_batches
        self.halves = [(0, references, batch_size - share), (references, others, share)]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[list[BatchSlot]]]:
        rank, processes_ = self.process
        for step in self.steps:
            own = self.step(step)[rank::processes_]
            yield [own[part :: self.micro_batches] for part in range(self.micro_batches)]

    def step(self, step: int) -> list[BatchSlot]:
        """Return the whole batch of a step, over all processes."""
        items = [
            first + self._order(half, number, position // number)[position % number]
            for half, (first, number, count) in enumerate(self.halves)
            for position in range(step * count, (step + 1) * count)
        ]
        return [BatchSlot(item, step, slot) for slot, item in enumerate(items)]

    def _order(self, half: int, number: int, round_: int) -> np.ndarray:
        """The order of a half's images when they all come for the round_-th time."""
        return np.random.default_rng((self.seed, half, round_)).permutation(number)


@torch.no_grad()
def encode(model: LatentDiffusion, images: list[Tensor]) -> list[Tensor]:
    """Return the posterior moments of each image and of its mirror image: (2, 2 c, h, w) each.

    The posterior is sampled anew in each training step, so caching it changes no distribution.
    """
    moments = []
    for pixels in tqdm(images, "encoding images", disable=not images or distributed.rank() > 0):
        posterior = model.posterior(torch.stack([pixels, pixels.flip(-1)]).to(model.device))
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).cpu())
    return moments
