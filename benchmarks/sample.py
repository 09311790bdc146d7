"""Sampling: DCI over plain sampling, our UNet step and whole sampling beside diffusers', and beside naive attention."""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import naive, peers
from benchmarks.measure import Way, compare, matrix_rate, synchronise
from ldm.acceleration import accelerate
from ldm.diffusion import LatentDiffusion
from ldm.randomness import PictureNoise

PROMPT = "a dog on the beach"


def measure(args: argparse.Namespace) -> list[dict]:
    """Run the comparison that `--peer` names; the options are those of scripts/benchmark.py."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = peers.build(args.model, dtype, args.device)
    model.config.image_size = args.size or model.config.image_size
    rate = matrix_rate(args.device, dtype)
    with torch.inference_mode():
        if args.peer == "none":
            return [dci_over_plain(args, model, rate)]
        if args.peer == "naive":
            others = {"naive": naive.naive_unet(model.unet)}
            return [unet_step(args, model, others, rate)]
        theirs = peers.with_weights_of(model)
        if args.compile:
            theirs.unet.compile(dynamic=False, mode="reduce-overhead" if args.device != "cpu" else None)
        step = unet_step(args, model, {"diffusers": lambda *inputs: theirs.unet(*inputs).sample}, rate)
        return [step, plain_sampling(args, model, theirs, rate)]


def dci_over_plain(args: argparse.Namespace, model: LatentDiffusion, rate: float) -> dict:
    """The whole process, text to pictures, with DCI and without."""
    from dci.config import ConceptConfig, FinetuneConfig
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch, sampling_options
    from dci.training import ICOTraining

    # An untrained concept costs what a trained one does.
    with torch.inference_mode(False):
        concept = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun="dog")), pictures=1).concept()
    model.requires_grad_(False)
    prompt = parse_prompt("a V* dog on the beach", concept.modifier_tokens, "dog")
    options = sampling_options(model, steps=args.steps)
    accelerate(model, args.device, compiled=args.compile)

    def way(dual) -> Way:
        return lambda: sample(model, concept, prompt, list(range(args.batch)), options, dual)

    dual = dual_branch(model, agg_time=args.agg_time)
    name = f"sampling, {options.steps} steps, {options.height}x{options.width} px, batch {args.batch}"
    ways = {"DCI": way(dual), "plain": way(None)}
    result = compare(name, ways, args.device, args.rounds, rate, {} if args.compile else None)
    return result | {"notes": {"share_of_time_inside_the_networks": share_inside(model, way(dual), args.device)}}


def share_inside(model: LatentDiffusion, call: Way, device: str) -> float:
    """The share of a call's time that passes inside UNet, autoencoder and text encoder."""
    inside = 0.0

    def timed(function: Callable) -> Callable:
        def run(*args, **kwargs):
            nonlocal inside
            synchronise(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(device)
            inside += time.perf_counter() - start
            return result

        return run

    places = ((model.unet, "forward"), (model.autoencoder, "decode"), (model.text_encoder, "encode"))
    for network, name in places:
        setattr(network, name, timed(getattr(network, name)))
    start = time.perf_counter()
    call()
    total = time.perf_counter() - start
    for network, name in places:
        delattr(network, name)
    return inside / total


def unet_step(args: argparse.Namespace, model: LatentDiffusion, others: dict[str, Callable], rate: float) -> dict:
    """One guided step of `--batch` pictures: twice as many rows."""
    accelerate(model, args.device, compiled=args.compile)
    rows, side = 2 * args.batch, model.config.image_size // model.config.autoencoder.downsampling
    x = torch.randn(rows, model.config.autoencoder.embed_dim, side, side, device=args.device, dtype=model.dtype)
    t = torch.full((rows,), 500, device=args.device)
    context = torch.randn(rows, 77, model.config.unet.context_dim, device=args.device, dtype=model.dtype)
    networks = {"ours": model.unet, **others}
    ways, outputs = remembering({name: functools.partial(net, x, t, context) for name, net in networks.items()})
    eager = {"ours": functools.partial(model.unet.forward, x, t, context)} if args.compile else None
    result = compare(f"UNet step, {side}x{side} latents, {rows} rows", ways, args.device, args.rounds, rate, eager)
    ours, theirs = outputs.values()
    return result | {"notes": {"relative_difference": difference(ours, theirs)}}


def plain_sampling(args: argparse.Namespace, model: LatentDiffusion, theirs: peers.Theirs, rate: float) -> dict:
    """Text to pictures beside diffusers' StableDiffusionPipeline: the same ids, first noise, solver and guidance."""
    from diffusers import StableDiffusionPipeline

    from dci.settings import sampling_options
    from ldm.sampling import text_to_image

    pipeline = StableDiffusionPipeline(theirs.vae, theirs.text, None, theirs.unet, peers.diffusers_scheduler(),
                                       None, None, requires_safety_checker=False)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    theirs.vae.register_to_config(scaling_factor=model.config.latent_scale)
    pipeline.vae_scale_factor = model.config.autoencoder.downsampling
    options = sampling_options(model, steps=args.steps, eta=0.0)
    indices = list(range(args.batch))
    shape = model.latent_shape(options.height, options.width)

    def diffusers() -> Tensor:
        ids = model.text_encoder.tokenize(["", PROMPT])
        negative, positive = theirs.text(ids)[0].split(1)
        latents = PictureNoise(options.seed, indices, shape, model.device)().to(model.dtype)
        return pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, num_images_per_prompt=args.batch,
                        latents=latents, num_inference_steps=options.steps, guidance_scale=options.scale,
                        height=options.height, width=options.width, output_type="pt").images  # fmt: skip

    ours = functools.partial(text_to_image, model, PROMPT, indices, options)
    ways, outputs = remembering({"ours": ours, "diffusers": diffusers})
    name = f"plain sampling, {options.steps} steps, {options.height}x{options.width} px, batch {args.batch}"
    result = compare(name, ways, args.device, args.rounds, rate, {} if args.compile else None)
    return result | {"notes": {"relative_difference": difference(outputs["ours"], 2 * outputs["diffusers"] - 1)}}


def remembering(ways: dict[str, Way]) -> tuple[dict[str, Way], dict[str, Tensor]]:
    """Return the ways, and where each will put its last output."""
    outputs: dict[str, Tensor] = {}
    return {name: functools.partial(lambda name, way: outputs.update({name: way()}), name, way)
            for name, way in ways.items()}, outputs  # fmt: skip


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of theirs."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
