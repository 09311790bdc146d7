"""The pipelines' DCI beside our own sampling: the same weights, the same noise, another loop and other schedulers."""

import functools

import pytest
import torch
from calls import PROMPT
from diffusers_world import GAIN, world
from helpers import mostly_slow
from tiny_models import relative_error

from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch, TokenMasks
from dci.dual_branch.sampling import BranchContexts, sample_latents
from ldm.noise import ImageNoise
from ldm.text_to_image import SamplingOptions

STEPS = 8
SCHEDULERS = {
    ("ddim", "leading"): ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("plms", "leading"): ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    ("dpm++2m", "leading"): ("DPMSolverMultistepScheduler", {}),
    ("dpm++2m", "trailing"): ("DPMSolverMultistepScheduler", {}),
    ("euler", "leading"): ("EulerDiscreteScheduler", {}),
}


def noises(world, indices=(0, 1)):
    return [ImageNoise(3, list(indices), (4, 16, 16), stream=stream) for stream in (0, 1)]


@torch.no_grad()
def ours(world, dual, solver, spacing, scale, base=None, negative=""):
    prompts = [parse_prompt(PROMPT, world.concept.names)] * 2
    options = SamplingOptions(steps=STEPS, scale=scale, height=32, width=32, solver=solver, spacing=spacing)
    contexts = BranchContexts.of(world.model, world.concept, prompts, negative, options.image_size().row())
    return sample_latents(world.model, contexts, TokenMasks.of(prompts), dual, options, noises(world), base=base)


def theirs(world, pipe, dual, solver, spacing, scale, **options):
    kind, own = SCHEDULERS[solver, spacing]
    pipe.scheduler = world.scheduler(kind, timestep_spacing=spacing, **own)
    first, auxiliary = (noise() for noise in noises(world))
    settings = {name: getattr(dual, name) for name in DualBranch.__dataclass_fields__}
    return pipe(
        PROMPT,
        num_images_per_prompt=2,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=first,
        auxiliary_latents=auxiliary,
        output_type="latent",
        **settings,
        **options,
    ).images


FAMILIES = ("sd1", "sd2", "xl")


def case(families=FAMILIES, scale=5.0, solver="ddim", spacing="leading", quick=(), **settings):
    name = "-".join(f"{name}={value}" for name, value in settings.items())
    dual = DualBranch(**{"gain": GAIN, **settings})
    return [
        pytest.param(
            family,
            dual,
            scale,
            solver,
            spacing,
            id=f"{family}-{solver}-{spacing}-{scale}-{name}",
            marks=() if family in quick else pytest.mark.slow,
        )
        for family in families
    ]


CASES = [
    *(one for solver, spacing in SCHEDULERS for one in case(solver=solver, spacing=spacing)),
    *case(["sd1", "xl"], agg_time=0, solver="dpm++2m"),
    *case(agg_time=1, solver="dpm++2m", quick=["sd1"]),
    *case(["sd1", "xl"], agg_lambda=-1.0, solver="euler"),
    *case(["sd1", "xl"], agg_lambda=1.0, solver="euler"),
    *case(shared_guidance=False, solver="dpm++2m", spacing="trailing"),
    *case(["sd1", "xl"], shared_guidance=False, agg_time=1, solver="plms"),
    *case(scale=1.0),
    *case(["sd1", "xl"], scale=1.0, shared_guidance=False, agg_lambda=1.0),
    *case(["sd1"], shared_noise=True, token_sharpness=3.0, pixel_sharpness=5.0),
    *case(["sd1"], layers=("middle", "layer0"), agg_lambda=1.0),
    *case(auxiliary_weights="base", agg_lambda=1.0, quick=["sd1"]),
    *case(["sd1"], auxiliary_weights="base", agg_lambda=1.0, shared_guidance=False),
]


@functools.cache
def pipe(name):
    return world(name).pipe()


@pytest.mark.parametrize(("name", "dual", "scale", "solver", "spacing"), CASES)
def test_latents_equal_our_sampling(name, dual, scale, solver, spacing):
    base = world(name).concept.replaced(world(name).base) if dual.auxiliary_weights == "base" else None
    expected = ours(world(name), dual, solver, spacing, scale, base)
    assert relative_error(theirs(world(name), pipe(name), dual, solver, spacing, scale), expected) < 1e-5


@pytest.mark.parametrize("negative", mostly_slow(["a cat in the snow", "a V* dog, blurred"], "a V* dog, blurred"))
@pytest.mark.parametrize("name", mostly_slow(["sd1", "xl"], "sd1"))
def test_negative_prompts_equal_ours(name, negative):
    """One that names the concept means the concept."""
    dual = DualBranch(gain=GAIN, shared_guidance=False)
    expected = ours(world(name), dual, "ddim", "leading", 5.0, negative=negative)
    found = theirs(world(name), pipe(name), dual, "ddim", "leading", 5.0, negative_prompt=negative)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, "sd1"))
def test_the_gain_follows_the_size(name):
    """As in our own sampling: 500 for 4096 pixels in the finest layer."""
    finest = min(layer.factor for layer in world(name).model.unet.cross_layers())
    expected = theirs(world(name), pipe(name), DualBranch(gain=500 * (16 // finest) ** 2 / 4096), "ddim", "leading", 5.0)
    found = theirs(world(name), pipe(name), DualBranch(gain=None), "ddim", "leading", 5.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, "sd1"))
def test_dci_does_something_to_these_latents(name):
    dual = DualBranch(gain=GAIN)
    found = theirs(world(name), pipe(name), dual, "ddim", "leading", 5.0)
    assert relative_error(ours(world(name), None, "ddim", "leading", 5.0), found) > 1e-4
