"""How long a grid will take, from the FLOPs of its networks and the rate of the device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dci.experiments.grid import GridPoint, Training
from dci.files import read_prompts
from dci.finetuning.config import GENERATE, concepts_of
from ldm.checkpoint import model_config
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.shipped import find

UTILISATION = {"cpu": 0.5, "cuda": 0.4}
"""Assumed share of the device's matrix-product rate that a network reaches; small ones reach less."""

BACKWARD = 2.1
"""FLOPs of a training step over those of its forward pass: the backward pass for keys, values and contexts."""


@dataclass(frozen=True)
class Estimate:
    """Of one grid; hours are of one device."""

    trainings: int
    images: int
    training_hours: float
    sampling_hours: float
    class_images: int = 0  # for regularization, which the base model makes first; their time is in sampling_hours


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model, multiply-add counted as 2, for one image of its own size."""

    unet: int  # one row forward
    decode: int


def cost(config: ModelConfig) -> Cost:
    """Count what a model computes, without memory or weights."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
        latent = torch.empty(1, *model.latent_shape(config.image_size, config.image_size))
        context = torch.empty(1, 77, config.unet.context_dim)
        t = torch.zeros(1, dtype=torch.long)
        vector = torch.empty(1, width) if (width := config.unet.adm_in_channels) else None
    counts = []
    for call in (lambda: model.unet(latent, t, context, vector=vector), lambda: model.autoencoder.decode(latent)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts.append(counter.get_total_flops())
    return Cost(*counts)


def matrix_rate(device: str, threads: int = 1, seconds: float = 0.3) -> float:
    """Measure FLOP/s of large matrix products: fp32 on a CPU with so many threads, bf16 on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _matrix_rate(device, seconds)
    finally:
        torch.set_num_threads(before)


def _matrix_rate(device: str, seconds: float) -> float:
    n, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=device, dtype=dtype)
    done, start = -1, time.perf_counter()
    while done < 1 or time.perf_counter() - start < seconds:
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        done += 1
        if done == 0:  # the first one is to warm up
            start = time.perf_counter()
    return done * 2 * n**3 / (time.perf_counter() - start)


def estimate(points: Sequence[GridPoint], device: str, rate: float) -> Estimate:
    """Estimate the points' time on one device; what is done already is not counted.

    Args:
        rate: the device's matrix products, FLOP/s.

    Raises:
        UserError: a model that is not on this machine.
    """
    left = [point for point in points if not point.result.is_file()]
    trainings = {point.training.name: point.training for point in left}
    models = {path: _model_of(path) for path in {training.config.model for training in trainings.values()}}
    costs = {path: cost(model) for path, model in models.items()}
    training_flops = sampling_flops = 0.0
    todo = [training for training in trainings.values() if not training.concept_file.exists()]
    for training in todo:
        rows = training.config.training.steps * training.config.training.batch_size
        training_flops += BACKWARD * costs[training.config.model].unet * rows
    for point in left:
        path, number = point.training.config.model, images_of(point)
        sampling_flops += number * (_rows(point, models[path]) * costs[path].unet + costs[path].decode)
    made = _class_images(todo)
    for (path, steps, *_), number in made.items():
        rows = 2 * (steps or models[path].sampling.get("steps", 50))
        sampling_flops += number * (rows * costs[path].unet + costs[path].decode)
    speed = rate * UTILISATION["cpu" if device == "cpu" else "cuda"] * 3600
    images = sum(map(images_of, left))
    return Estimate(len(todo), images, training_flops / speed, sampling_flops / speed, sum(made.values()))


def _class_images(trainings: Sequence[Training]) -> dict[tuple, int]:
    """How many regularization images the trainings will have made, each set once: (model, steps, folder, noun) -> number."""
    made = {}
    for training in trainings:
        model, options = training.config.model, training.config.generate
        for concept in concepts_of(training.config):
            if concept.regularization == GENERATE:
                made[model, options.steps, options.folder or str(training.folder), concept.class_noun] = options.number
    return made


def images_of(point: GridPoint) -> int:
    """Return how many images a point samples."""
    return point.task.sampling.n_samples * len(read_prompts(point.task.prompts))


def _model_of(path: str) -> ModelConfig:
    if not find(path).exists():
        raise UserError(f"no estimate: the shape of {path} is in its weights; give a configuration and checkpoint=")
    return model_config(path)


def _rows(point: GridPoint, model: ModelConfig) -> float:
    """UNet rows of an image: two a step, and one more while both branches run."""
    options = point.task.sampling
    defaults = {"steps": 50, "agg_time": 0.3} | dict(model.sampling)
    steps = defaults["steps"] if options.steps is None else options.steps
    dual = defaults["agg_time"] if options.agg_time is None else options.agg_time
    return steps * (2 + (0 if options.no_dci else dual))


def describe(plan: Estimate, device: str, rate: float, workers: int, given: bool = False) -> str:
    """Return the estimate in words.

    Args:
        given: whether the rate was asked for, and not measured here.
    """
    total = plan.training_hours + plan.sampling_hours
    share = UTILISATION["cpu" if device == "cpu" else "cuda"]
    also = f", and {plan.class_images:,} regularization images" if plan.class_images else ""
    return (
        f"{plan.trainings} trainings and {plan.images:,} images are to be made{also}.\n"
        f"Estimate: {_time(plan.training_hours)} of training and {_time(plan.sampling_hours)} of sampling, "
        f"{_time(total / workers)} with {workers} at a time\n"
        f"(at {share:.0%} of the {rate / 1e12:.3g} TFLOP/s {'given for' if given else 'measured on'} one {device} device; "
        "loading and scoring not counted)"
    )


def _time(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
