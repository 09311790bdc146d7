"""Where the sampling programs put their images, and the metadata beside them."""

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from dci.cli.arguments import ChosenSeed
from dci.files import make_new_folder
from dci.samples.image_metadata import LoadedModel, PromptMetadata, SamplingMetadata
from dci.samples.image_metadata import sampling_metadata as metadata_of
from ldm.errors import UserError


def sampling_metadata(
    args: argparse.Namespace, base: str, checkpoint: str | None, prepared, model_hash: str
) -> SamplingMetadata:
    """Return everything needed to make images again but their prompts and numbers, and a concept's metadata.

    Args:
        prepared: the request, as `dci.pipeline` prepares it.
        model_hash: fingerprint of the base model.
    """
    from dci.concept.loras import lora_hashes

    loaded = LoadedModel(base, checkpoint, model_hash, args.precision, args.ema, args.clip_skip, args.vae)
    return metadata_of(loaded, prepared, args.init_image, args.mask, lora_hashes(args.lora))


def generate(
    args: argparse.Namespace,
    prompts: Sequence[PromptMetadata],
    metadata: SamplingMetadata,
    calls: int,
    sample: Callable,
    beside=None,
) -> None:
    """Generate what is missing of every prompt's images into the folder for them, under a progress bar.

    Args:
        metadata: of all images.
        calls: solver steps of an image.
        sample: (images of the plan, callback for each step) -> pixels (b, 3, h, w).
        beside: what is written beside the images of the last call of `sample`: `save(outdir, names)`, and
            `is_there(outdir, name)`, without which an image counts as missing.
    """
    from tqdm import tqdm

    from dci.samples import worker
    from dci.samples.plan import Plan
    from dci.samples.writer import SampleFolder

    plan = Plan(list(prompts), metadata, args.seeds or [args.seed], args.n_samples * args.n_iter, args.batch_size)
    batches = plan.batches(*args.shard)
    outdir = Path(args.outdir) if args.outdir else _new_outdir(args.prompt or Path(args.from_file).stem)
    complete = partial(beside.is_there, outdir) if beside else lambda name: True
    sampled, whole = 0, min(plan.batch_size, len(plan)) if args.compile and not beside else 0
    with (
        SampleFolder(outdir, plan, args.prompt is not None, complete) as folder,
        tqdm(total=len(batches) * calls, desc="sampling", unit="step") as progress,
    ):

        def done(numbers: range, here: bool) -> None:
            nonlocal sampled
            sampled += here
            if here and beside:
                beside.save(outdir, [folder.file(number).stem for number in numbers])
            progress.update(0 if here else calls)

        def filled(images: list):
            # A compiled UNet would be compiled again for a smaller batch: the last one is filled up.
            more = [images[-1]] * (whole - len(images))
            return sample([*images, *more], lambda _: progress.update())[: len(images)]

        worker.sample_missing(folder, batches, filled, done)
        left = sum(len(folder.missing(numbers)) for numbers in batches)
        sheet = folder.grid_file(len(prompts) - 1)
    if sampled < len(batches):
        print(f"Batches: {sampled} sampled, the other {len(batches) - sampled} made before or by other workers")
    if left:
        print(f"Images that other workers are making: {left}; repeat the command should one of them be stopped")
    print(f"Images: {outdir / 'samples'}" + (f"\nGrid: {sheet}" if sheet.is_file() else ""))


def check_sharing(args: argparse.Namespace) -> None:
    """Print which seed was chosen, and raise UserError for shards that would not meet in one folder."""
    if args.shard[1] > 1 and not args.outdir:
        raise UserError("--shard needs --outdir: the folder that all shards put their images into")
    if isinstance(args.seed, ChosenSeed):
        if args.shard[1] > 1:
            raise UserError("--seed -1 chooses another seed in each shard: give the seed")
        print(f"Seed: {args.seed}")


def _new_outdir(prompt: str) -> Path:
    """Make and return a folder in outputs/ named after the time and the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return make_new_folder(Path("outputs"), f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{words}")
