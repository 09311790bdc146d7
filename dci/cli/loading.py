"""Load what the arguments name: the device, the base model, the image to start from, a compressed concept file."""

import argparse
import functools
from pathlib import Path

from dci.cli.arguments import Parser, as_options, number, sampling_arguments
from dci.concept.trained_on import TrainedOn
from ldm.errors import UserError
from ldm.shipped import ROOT

TINY = ROOT / "configs/model/tiny.yaml"


def pick_device(name: str) -> str:
    """Return the torch device that `--device` asks for; auto is CUDA where there is one."""
    from ldm.runtime.acceleration import pick_device as pick

    try:
        return pick(name)
    except UserError as error:
        raise UserError(f"--{error}") from error


def base_model(args: argparse.Namespace, trained: TrainedOn | None = None) -> tuple[str, str | None]:
    """Return the model and the checkpoint that sampling should load: arguments of `load_model`.

    Args:
        trained: what a concept was trained on, which is taken where no model is asked for.
    """
    if args.model:
        return args.model, args.checkpoint
    return (trained or TrainedOn()).base(args.checkpoint, str(TINY))


def base_vae(args: argparse.Namespace, trained: TrainedOn) -> str | None:
    """Return the autoencoder in place of the base model's own, if any: `--vae`, or what the concept was trained with.

    Like the model it is the concept's own only where no other model is asked for.

    Raises:
        UserError: the concept's own is not there any more.
    """
    own_model = base_model(args, trained)[0] == trained.model
    return args.vae if args.vae or args.model or not own_model else trained.own_vae()


def load_concept_base(args: argparse.Namespace, concept, vae: str | None = None, mapped: bool = False):
    """Load the base model of a concept, with the LoRAs that it was trained on, in fp32 on the CPU.

    Args:
        mapped: leave it in the file's precision, in which it takes no memory; LoRAs need fp32.
    """
    import torch

    from dci.concept.loras import add_trained_loras
    from ldm.checkpoint import load_model

    whole = not mapped or concept.trained_on.loras
    model = load_model(*base_model(args, concept.trained_on), dtype=torch.float32 if whole else None, vae=vae)
    add_trained_loras(model, concept)
    return model


def add_concept_options(parser: Parser) -> None:
    """Add the options that say which concept to sample."""
    file = "the concept.safetensors that training wrote, or another program's files (docs/formats.md)"
    parser.add_argument("--concept", required=True, nargs="+", action="extend", metavar="FILE", help=file)
    parser.add_argument("--class-noun", help="of another program's files: the ordinary word for the concept, such as dog")
    parser.add_argument(
        "--trigger", metavar="WORD", help="of another program's files: the words for it, where no token was learned"
    )
    strength = "factor on the concept's change of the weights (default 1; 0 leaves its tokens alone)"
    parser.add_argument("--strength-concept", type=number, default=1.0, metavar="0..1.5", help=strength)


def read_concept(args: argparse.Namespace):
    """Return the concept of `--concept`: ours, or another program's, printing what was recognised in it.

    Raises:
        UserError: a file is missing, broken or of no known kind, or options do not go together.
    """
    from functools import partial

    from dci.concept.concept_file import Concept
    from dci.concept.foreign.importing import import_concept, is_foreign
    from ldm.checkpoint import load_model, model_config

    if len(args.concept) == 1 and not is_foreign(args.concept[0]):
        if args.class_noun or args.trigger:
            raise UserError(f"--class-noun and --trigger are for other programs' files: {args.concept[0]} has its own")
        return Concept.load(args.concept[0])
    base, checkpoint = base_model(args)
    load = partial(load_model, base, checkpoint, dtype=None)
    found = import_concept(args.concept, args.class_noun, args.trigger, model_config(base), load, identify=False)
    print("\n".join(map(as_options, found.said)))
    return found.concept


def load_base(args: argparse.Namespace, base: str, checkpoint: str | None):
    """Load the base model, in the precision and layout that suit `--device` or are asked for, still on the CPU.

    `--precision auto` is printed, and replaced in `args` by what it came to.
    """
    import torch

    from dci.samples.image_metadata import PRECISIONS, precision_name
    from ldm.checkpoint import load_model
    from ldm.runtime.acceleration import accelerate, fastest_precision

    device = pick_device(args.device)
    if args.precision == "auto":
        dtype = functools.partial(fastest_precision, device=device)
    else:
        dtype = getattr(torch, PRECISIONS[args.precision])
    model = load_model(base, checkpoint, dtype=dtype, ema=args.ema, clip_skip=args.clip_skip, vae=args.vae)
    if args.precision == "auto":
        args.precision = precision_name(model.dtype)
        print(f"Precision: {args.precision}, the fastest for this model on {device}")
    done = accelerate(model, device, args.channels_last, args.compile)
    if done:
        print(f"For speed: {', '.join(done)}")
    return model


def compress_file(args: argparse.Namespace, source: Path, target: Path, model) -> None:
    """Write a concept file whose weights are low-rank changes, and print what that costs.

    Args:
        model: the base model, without the concept.
    """
    from dci.concept.concept_file import Concept
    from dci.concept.low_rank import compress

    compression = compress(Concept.load(source), model, args.rank, args.energy, args.max_mb)
    compression.concept.save(target)
    print(f"{target}: {compression.describe()}; the file has {target.stat().st_size / 1e6:.2f} MB")


def request_of(args: argparse.Namespace, prompts: list[str], **more):
    """Return what a sampling program is asked for, as the pipeline takes it.

    Args:
        more: fields of `dci.pipeline.Request`; those of its settings are added to the sampler's.

    Raises:
        UserError: the image to start from, or its mask, cannot be used.
    """
    from dci.pipeline import Request
    from ldm.images import read_image
    from ldm.masks import read_mask

    image = read_image(args.init_image) if args.init_image else None
    mask = None
    if args.mask:
        if image is None:
            raise UserError("mask= needs an image to start from: give it as init_image=")
        mask = read_mask(args.mask, image, args.init_image)
    settings = sampling_arguments(args) | more.pop("settings", {})
    return Request(
        prompts,
        args.n_samples,
        negative=args.negative_prompt,
        init_image=image,
        mask=mask,
        strength=args.strength,
        batch_size=args.batch_size,
        settings=settings,
        **more,
    )
