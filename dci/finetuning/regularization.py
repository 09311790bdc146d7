"""Regularization images made by the base model, kept in a folder for the next run."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dci.dual_branch.options import sampling_options
from dci.finetuning import distributed
from dci.finetuning.config import GenerateConfig
from dci.samples.image_metadata import PromptMetadata, SamplingMetadata
from dci.samples.plan import Plan, PlannedImage
from dci.samples.worker import sample_missing
from dci.samples.writer import SampleFolder
from ldm.checkpoint import fingerprint
from ldm.diffusion import LatentDiffusion
from ldm.text_to_image import text_to_image

PATIENCE = 24 * 3600  # seconds that a process waits for the images of the others


@dataclass(frozen=True)
class PromptsInTurn(Plan):
    """`n_samples` images in all, whose prompts are taken in turn, so that a larger number adds to what is there."""

    def __len__(self) -> int:
        return self.n_samples

    def image(self, number: int) -> PlannedImage:
        """Return what image `number` is of: its noise is that of its number."""
        return PlannedImage(number % len(self.prompts), self.seeds[0], number)


def generate(model: LatentDiffusion, config: GenerateConfig, class_noun: str, logdir: Path) -> Path:
    """Generate captioned images of a class until there are `config.number`.

    An image depends on its number, its prompt and the model alone, so an interrupted stage goes on
    where it stopped, a larger number adds to what is there, and several processes share the work.

    Args:
        model: the base model, unchanged.
        logdir: holds the folder where the configuration names none.

    Returns:
        The folder, as sampling writes it: samples/NNNNN.png, and prompts.json with how they were made.
    """
    options = sampling_options(model, steps=config.steps, scale=config.scale, seed=config.seed)
    prompts = [prompt.replace("{}", class_noun) for prompt in config.prompts]
    metadata = SamplingMetadata(model_hash=fingerprint(model), options=options)
    digest = hashlib.sha256(json.dumps([prompts, metadata.to_json()], sort_keys=True).encode()).hexdigest()[:8]
    root = Path(config.folder) if config.folder else logdir / "regularization"
    folder = root / f"{class_noun.replace(' ', '-').replace('/', '-')}-{digest}"
    named = [PromptMetadata(prompt) for prompt in prompts]
    plan = PromptsInTurn(named, metadata, [config.seed], config.number, config.batch_size)

    def sample(images: list[PlannedImage]):
        texts, indices = [prompts[image.prompt] for image in images], [image.number for image in images]
        return text_to_image(model, texts, indices, options)

    with SampleFolder(folder, plan) as samples:
        _make(samples, sample)
    done = f"{config.number} images of '{class_noun}' made by the base model, in {folder}"
    distributed.print_rank_zero(f"Regularization: {done}")
    return folder


def _make(folder: SampleFolder, sample) -> None:
    """Make what is missing, in every process that the run has; return when all of it is there."""
    everything = range(len(folder.plan))
    missing = len(folder.missing(everything))
    if not missing:
        return
    batches, number = folder.plan.batches(), distributed.rank()
    start = len(batches) * number // max(distributed.world_size(), 1)  # each process begins elsewhere
    disable, end = number > 0, time.monotonic() + PATIENCE
    with tqdm(total=missing, desc="regularization images", unit="image", disable=disable) as bar:

        def made(numbers: range, here: bool) -> None:
            bar.update(len(numbers) if here else 0)

        while folder.missing(everything):
            if time.monotonic() > end:
                raise TimeoutError(f"{folder.folder} still lacks images that other processes were to make")
            # What a process that has ended left behind is made here.
            sample_missing(folder, [*batches[start:], *batches[:start]], sample, made, grids=False)
            if folder.missing(everything):
                time.sleep(0.5)
