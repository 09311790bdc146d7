"""Sampling: DCI over plain sampling, our UNet step and whole sampling beside diffusers', and beside naive attention."""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import naive, peers, pipeline
from benchmarks.measure import Way, compare, matrix_rate, synchronise
from ldm.diffusion import LatentDiffusion
from ldm.noise import ImageNoise
from ldm.runtime.acceleration import accelerate

PROMPT = "a dog on the beach"


def measure(args: argparse.Namespace) -> list[dict]:
    """Run the comparison that `--peer` names; the options are those of scripts/benchmark.py."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = peers.build(args.model, dtype, args.device, args.size)
    rate = matrix_rate(args.device, dtype)
    if args.peer == "pipeline":
        return [pipeline.dci_over_plain(args, model, rate)]
    # What shares the weights is made first: ours may be packed or compiled then.
    plain = naive.naive_unet(model.unet) if args.peer == "naive" else None
    theirs = peers.with_weights_of(model) if args.peer == "diffusers" else None
    accelerate(model, args.device, compiled=args.compile)
    with torch.inference_mode():
        if plain:
            return [unet_step(args, model, {"naive": plain}, rate)]
        if theirs is None:
            return [dci_over_plain(args, model, rate)]
    prepare(theirs, args)
    with torch.inference_mode():
        step = unet_step(args, model, {"diffusers": lambda *inputs: theirs.unet(*inputs).sample}, rate)
        return [step, plain_sampling(args, model, theirs, rate)]


def prepare(theirs: peers.Theirs, args: argparse.Namespace) -> None:
    """Give diffusers' networks what `accelerate` gives ours: the layout, and compiled graphs."""
    on_gpu = args.device != "cpu"
    if on_gpu and args.dtype != "float32":
        for network in (theirs.unet, theirs.vae):
            network.to(memory_format=torch.channels_last)
    if args.compile:
        theirs.unet.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)


def anew(model: LatentDiffusion, call: Way) -> Way:
    """Return a way to make a call that encodes its prompts, whatever was encoded before."""

    def way() -> object:
        model.text_encoder.remembered.forget()
        return call()

    return way


def per_second(args: argparse.Namespace, result: dict) -> dict:
    """Images per second, of each way."""
    return {f"images_per_second,_{way}": args.batch / figures["median"] for way, figures in result["ways"].items()}


def dci_over_plain(args: argparse.Namespace, model: LatentDiffusion, rate: float) -> dict:
    """The whole process, text to images, with DCI and without."""
    from dci.concept.modifier_tokens import ConceptName
    from dci.concept.prompts import parse_prompt
    from dci.dual_branch.options import dual_branch, sampling_options
    from dci.dual_branch.sampling import SampleRequest, sample
    from dci.finetuning.config import ConceptConfig, FinetuneConfig
    from dci.finetuning.module import ICOTraining

    # An untrained concept costs what a trained one does.
    with torch.inference_mode(False):
        concept = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun="dog")), images=1).concept()
    prompt = parse_prompt("a V* dog on the beach", ConceptName(concept.modifier_tokens, "dog"))
    options = sampling_options(model, steps=args.steps)

    def way(dual) -> Way:
        return anew(model, lambda: sample(model, concept, SampleRequest(prompt, list(range(args.batch)), options, dual)))

    dual = dual_branch(model, agg_time=args.agg_time)
    name = f"sampling, {options.steps} steps, {options.height}x{options.width} px, batch {args.batch}"
    ways = {"DCI": way(dual), "plain": way(None)}
    result = compare(name, ways, args.device, args.rounds, rate, args.compile)
    inside = {"share_of_time_inside_the_networks": share_inside(model, way(dual), args.device)}
    return result | {"notes": inside | per_second(args, result)}


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

    # Not the UNet's own call, which may be compiled.
    places = ((model, "predict"), (model.autoencoder, "decode"), (model.text_encoder, "encode"))
    for network, name in places:
        setattr(network, name, timed(getattr(network, name)))
    start = time.perf_counter()
    call()
    total = time.perf_counter() - start
    for network, name in places:
        delattr(network, name)
    return inside / total


def unet_step(args: argparse.Namespace, model: LatentDiffusion, others: dict[str, Callable], rate: float) -> dict:
    """One guided step of `--batch` images: twice as many rows."""
    rows, side = 2 * args.batch, model.config.image_size // model.config.autoencoder.downsampling
    x = torch.randn(rows, model.config.autoencoder.embed_dim, side, side, device=args.device, dtype=model.dtype)
    t = torch.full((rows,), 500, device=args.device)
    context = torch.randn(rows, 77, model.config.unet.context_dim, device=args.device, dtype=model.dtype)
    networks = {"ours": model.unet, **others}
    ways, outputs = remembering({name: functools.partial(net, x, t, context) for name, net in networks.items()})
    result = compare(f"UNet step, {side}x{side} latents, {rows} rows", ways, args.device, args.rounds, rate, args.compile)
    ours, theirs = outputs.values()
    return result | {"notes": {"relative_difference": difference(ours, theirs)}}


def plain_sampling(args: argparse.Namespace, model: LatentDiffusion, theirs: peers.Theirs, rate: float) -> dict:
    """Text to images beside diffusers' StableDiffusionPipeline: the same ids, first noise, solver and guidance."""
    from diffusers import StableDiffusionPipeline

    from dci.dual_branch.options import sampling_options
    from ldm.text_to_image import text_to_image

    pipeline = StableDiffusionPipeline(
        theirs.vae, theirs.text, None, theirs.unet, peers.diffusers_scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs.vae.register_to_config(scaling_factor=model.config.latent_scale)
    pipeline.vae_scale_factor = model.config.autoencoder.downsampling
    options = sampling_options(model, steps=args.steps, eta=0.0)
    indices = list(range(args.batch))
    shape = model.latent_shape(options.height, options.width)

    def diffusers() -> Tensor:
        ids = model.text_encoder.tokenize(["", PROMPT])
        negative, positive = theirs.text(ids)[0].split(1)
        latents = ImageNoise(options.seed, indices, shape, model.device)().to(model.dtype)
        return pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            num_images_per_prompt=args.batch,
            latents=latents,
            num_inference_steps=options.steps,
            guidance_scale=options.scale,
            height=options.height,
            width=options.width,
            output_type="pt",
        ).images

    ours = anew(model, lambda: text_to_image(model, PROMPT, indices, options))
    ways, outputs = remembering({"ours": ours, "diffusers": diffusers})
    name = f"plain sampling, {options.steps} steps, {options.height}x{options.width} px, batch {args.batch}"
    result = compare(name, ways, args.device, args.rounds, rate, args.compile)
    apart = {"relative_difference": difference(outputs["ours"], 2 * outputs["diffusers"] - 1)}
    return result | {"notes": apart | per_second(args, result)}


def remembering(ways: dict[str, Way]) -> tuple[dict[str, Way], dict[str, Tensor]]:
    """Return the ways, and where each will put its last output."""
    outputs: dict[str, Tensor] = {}

    def kept(name: str, way: Way) -> None:
        outputs[name] = way().clone()  # another CUDA graph may take the memory of this one's output

    return {name: functools.partial(kept, name, way) for name, way in ways.items()}, outputs


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of theirs."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
