"""DCI in a pipeline of diffusers over that same pipeline without it: text to images, on diffusers' own networks."""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import Way, compare
from ldm.diffusion import LatentDiffusion

PROMPT = "a V* dog on the beach"


def dci_over_plain(args: argparse.Namespace, model: LatentDiffusion, rate: float) -> dict:
    """Return the figures of the pipeline with DCI and without, the options as scripts/benchmark.py has them."""
    from dci.dual_branch.options import dual_branch

    pipe = dci_pipeline(model)
    pipe.to(args.device)
    if args.compile:
        pipe.unet.compile(dynamic=False)
    size, dual = model.config.image_size, dual_branch(model, agg_time=args.agg_time)

    def way(**options) -> Way:
        def call() -> object:
            generator = torch.Generator().manual_seed(0)
            return pipe(
                PROMPT,
                num_inference_steps=args.steps,
                guidance_scale=6.0,
                num_images_per_prompt=args.batch,
                height=size,
                width=size,
                generator=generator,
                output_type="pt",
                **options,
            ).images

        return call

    name = f"diffusers' pipeline, {args.steps} steps, {size}x{size} px, batch {args.batch}"
    ways = {"DCI": way(agg_time=dual.agg_time, gain=dual.gain), "plain": way(dci=False)}
    result = compare(name, ways, args.device, args.rounds, rate, args.compile)
    speeds = {f"images_per_second,_{way}": args.batch / figures["median"] for way, figures in result["ways"].items()}
    return result | {"notes": speeds}


def dci_pipeline(model: LatentDiffusion):
    """Return diffusers' pipeline on a model's weights, with a concept: an untrained one costs what a trained one does."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from dci.diffusers import DCIPipeline
    from dci.finetuning.config import ConceptConfig, FinetuneConfig
    from dci.finetuning.module import ICOTraining
    from ldm.formats.diffusers_export import write_tokenizer

    concept = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun="dog")), images=1).concept()
    theirs = peers.with_weights_of(model.requires_grad_(False))
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), model.config.text_encoder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    theirs.vae.register_to_config(scaling_factor=model.config.latent_scale)
    pipe = StableDiffusionPipeline(
        theirs.vae,
        theirs.text,
        tokenizer,
        theirs.unet,
        peers.diffusers_scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe = DCIPipeline.from_pipe(pipe)
    pipe.load_concept(concept, check_base=False)  # in bf16 random weights have no file to be recognised by
    return pipe
