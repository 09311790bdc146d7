"""Reference and regularization pictures, as cached latents, and their batches."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from ldm import tokenizer
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.images import list_pictures, read_picture, square, to_tensor
from ldm.tokenizer import tokenize

REGULARIZATION = -1  # in place of a reference picture's index


@dataclass(frozen=True)
class ConceptBatch:
    """Pictures of one training step."""

    moments: Tensor  # posterior mean and log-variance of each picture and its mirror image (b, 2, 2 c, h, w)
    pictures: list[int]  # index of each reference picture, or REGULARIZATION
    caption_ids: Tensor  # (b, 77); read only for regularization pictures

    def to(self, device: torch.device) -> "ConceptBatch":
        return ConceptBatch(self.moments.to(device), self.pictures, self.caption_ids.to(device))


class ConceptDataset(Dataset):
    """All pictures of a run: first the reference pictures, then the regularization pictures."""

    def __init__(self, model: LatentDiffusion, images: str | Path, regularization: str | Path | None = None):
        """Read and encode every picture once.

        Raises:
            UserError: a folder is missing or empty, a picture is broken, or a caption is missing.
        """
        files = list_pictures(images)
        self.references = len(files)
        captions = [""] * len(files)
        if regularization is not None:
            class_files = list_pictures(regularization)
            files += class_files
            captions += [_caption(file) for file in class_files]
        self.moments = encode_files(model, files)
        self.caption_ids = torch.tensor([tokenizer.frame(tokenize(caption)) for caption in captions])

    def __len__(self) -> int:
        return len(self.moments)

    def __getitems__(self, items: list[int]) -> ConceptBatch:
        pictures = [item if item < self.references else REGULARIZATION for item in items]
        return ConceptBatch(self.moments[items], pictures, self.caption_ids[items])


class HalfAndHalf(Sampler):
    """Batches that are half reference and half regularization pictures, or references alone.

    Each half goes through its pictures in random order, all of them before any comes again.
    """

    def __init__(self, dataset: ConceptDataset, batch_size: int, steps: int, generator: torch.Generator):
        self.steps, self.generator = steps, generator
        references, others = range(dataset.references), range(dataset.references, len(dataset))
        share = batch_size // 2 if others else 0
        if others and not share:
            raise UserError("training.batch_size=1 leaves no room for regularization pictures: give 2 or more")
        self.parts = [(references, batch_size - share), (others, share)]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        streams = [self._endless(part) for part, count in self.parts]
        for _ in range(self.steps):
            yield [next(s) for s, (_, count) in zip(streams, self.parts, strict=True) for _ in range(count)]

    def _endless(self, items: range):
        while True:
            for i in torch.randperm(len(items), generator=self.generator).tolist():
                yield items[i]


@torch.inference_mode()
def encode_files(model: LatentDiffusion, files: list[Path]) -> Tensor:
    """Return the posterior moments of each picture and of its mirror image: (n, 2, 2 c, h, w).

    The posterior is sampled anew in each training step, so caching it changes no distribution.
    """
    # All are read before any is encoded: a broken file shows at once.
    pictures = [to_tensor(square(read_picture(file), model.config.image_size)) for file in files]
    moments = []
    for pixels in tqdm(pictures, "encoding pictures"):
        posterior = model.autoencoder.encode(torch.stack([pixels, pixels.flip(-1)]).to(model.device))
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).cpu())
    return torch.stack(moments).clone()


def _caption(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"no caption {file}: put a text file with the caption beside each regularization picture")
    return " ".join(file.read_text(encoding="utf-8").split())
