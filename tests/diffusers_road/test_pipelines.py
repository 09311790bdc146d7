"""Whole pipelines from a folder that diffusers saved: every kind, every argument, and what users load beside a concept."""

import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from calls import FEW, INTO, PROMPT, controlnet, half_mask, latents, picture, seeded, with_and_without
from diffusers_world import world
from helpers import apart, mostly_slow
from PIL import Image
from tiny_models import relative_error

from dci.diffusers import DCIPipeline
from ldm.errors import UserError
from ldm.shipped import ROOT

IMG2IMG, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"


@pytest.fixture(scope="module")
def sd1():
    return world("sd1")


@pytest.fixture(scope="module")
def pipe(sd1):
    return sd1.pipe()


KINDS = {
    "text": (None, {}, {}),
    "image": (IMG2IMG, {}, {"image": picture(), "strength": 0.9}),
    "inpaint": (INPAINT, {}, INTO),
    "inpaint a little": (INPAINT, {}, INTO | {"strength": 0.8}),
    "control": ("StableDiffusionControlNetPipeline", "controlnet", {"image": picture(1)}),
    "control, guess": ("StableDiffusionControlNetPipeline", "controlnet", {"image": picture(1), "guess_mode": True}),
    "control, image": (
        "StableDiffusionControlNetImg2ImgPipeline",
        "controlnet",
        {"image": picture(), "control_image": picture(1), "strength": 0.9},
    ),
    "control, inpaint": (
        "StableDiffusionControlNetInpaintPipeline",
        "controlnet",
        {"image": picture(), "control_image": picture(1), "mask_image": half_mask(), "strength": 1.0},
    ),
}


def made(sd1, kind):
    name, components, options = KINDS[kind]
    if components == "controlnet":
        components = {"controlnet": controlnet(sd1.plain().unet)}
    return sd1.pipe(name, **components), options


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "inpaint"))
def test_kinds(sd1, kind):
    """A weight of one is the pipeline by itself; DCI is something else; separate guidance is another thing again."""
    pipe, options = made(sd1, kind)
    found, plain, options = with_and_without(latents, pipe, options)
    assert relative_error(latents(pipe, agg_lambda=-1e6, shared_guidance=False, **options), plain) < 1e-5
    assert 1e-5 < relative_error(found, plain) < 0.5
    assert torch.equal(found, latents(pipe, **options))


@pytest.mark.slow
def test_inpainting_models_with_nine_channels(sd1):
    unet = diffusers.UNet2DConditionModel.from_config({**sd1.plain().unet.config, "in_channels": 9})
    weights = sd1.plain().unet.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], 0.05 * torch.randn(32, 5, 3, 3)], dim=1)
    unet.load_state_dict(weights)
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **{**sd1.plain().components, "unet": unet.eval()}, requires_safety_checker=False
    )
    pipe = DCIPipeline.from_pipe(pipe)
    pipe.load_concept(sd1.file)
    options = INTO
    plain = latents(pipe, dci=False, **options)
    assert relative_error(latents(pipe, agg_lambda=-1e6, **options), plain) < 1e-5
    assert relative_error(latents(pipe, **options), plain) > 1e-5
    assert relative_error(latents(pipe, shared_guidance=False, **options), latents(pipe, **options)) > 1e-6


@pytest.mark.slow
def test_the_auxiliary_branch_keeps_what_inpainting_keeps(sd1):
    """With the same prompts and noise in both branches they are one, in what is kept and in what is painted."""
    pipe, options = made(sd1, "inpaint a little")
    kept = []

    def look(pipe, step, timestep, tensors):
        if pipe.auxiliary_latents is not None:
            kept.append((pipe.auxiliary_latents.clone(), tensors["latents"]))
        return {}

    branches = pipe.parse(PROMPT)
    embeds = pipe.encode_prompt(branches.concept, "cpu", 1, False)[0]
    negative = pipe.encode_prompt("", "cpu", 1, False)[0]
    latents(
        pipe,
        None,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        branch_prompts=branches,
        auxiliary_prompt_embeds=embeds,
        shared_noise=True,
        callback_on_step_end=look,
        agg_time=1,
        **options,
    )
    assert len(kept) == 3
    for auxiliary, concept in kept:
        assert relative_error(auxiliary[..., 8:], concept[..., 8:]) < 1e-5
        # Its part to keep is put back when the next step begins.
        assert relative_error(auxiliary[..., :8], concept[..., :8]) > 1e-3


@pytest.mark.slow
def test_calls_are_those_of_diffusers(pipe):
    """Lists, outputs, callbacks and options of the pipeline's own call."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape, tensors["prompt_embeds"].shape))
        if step == 2:  # guidance ends early, as diffusers' documentation shows it
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    prompts = [PROMPT, "a painting of {} with a hat"]
    options = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "guidance_rescale": 0.5,
        "clip_skip": 1,
        "eta": 0.5,
        "negative_prompt": ["a cat", ""],
        "num_images_per_prompt": 2,
        "generator": [seeded(i) for i in range(4)],
        "agg_time": 1,
    }
    plain = latents(pipe, prompts, agg_lambda=-1e6, **options)
    options["generator"] = [seeded(i) for i in range(4)]
    assert relative_error(plain, latents(pipe, prompts, dci=False, **options)) < 1e-5
    assert seen[0] == (0, (4, 4, 16, 16), (8, 77, 64))
    images = pipe(prompts, height=48, width=32, guidance_scale=3, **FEW).images
    assert [image.size for image in images] == [(32, 48)] * 2
    array, unsafe = pipe(PROMPT, output_type="np", return_dict=False, generator=seeded(), **FEW)
    assert array.shape == (1, 32, 32, 3)
    assert unsafe is None
    assert np.array_equal(array, pipe(PROMPT, output_type="np", generator=seeded(), **FEW).images)
    assert pipe(PROMPT, None, 32, 2).images[0].size == (32, 32)  # arguments by their place


def test_prompt_embeds_in_place_of_prompts(pipe):
    branches = pipe.parse(PROMPT)
    embeds, negative = pipe.encode_prompt(branches.concept, "cpu", 1, True, "")
    found = latents(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, branch_prompts=branches)
    assert torch.equal(found, latents(pipe))
    with pytest.raises(UserError, match="branch_prompts"):
        latents(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    with pytest.raises(UserError, match="auxiliary_noun belongs to the prompts"):
        latents(pipe, None, prompt_embeds=embeds, branch_prompts=branches, auxiliary_noun="elephant")


def test_auxiliary_noun_and_shared_noise_matter(pipe):
    found = latents(pipe)
    for change in ({"auxiliary_noun": "elephant"}, {"shared_noise": True}, {"agg_time": 0.3}, {"layers": "middle"}):
        assert not torch.equal(latents(pipe, **change), found)


def test_maps_of_every_layer_and_step(pipe):
    seen = []
    found = latents(pipe, maps=seen.append, layers=("middle", "16"), num_images_per_prompt=2)
    assert torch.equal(found, latents(pipe, layers=("middle", "16"), num_images_per_prompt=2))
    assert [m.number for m in seen[:4]] == [0, 1, 2, 3][: len({m.number for m in seen})]
    assert {m.layer.name.partition(".")[0] for m in seen} >= {"input_blocks", "middle_block"}
    for one in seen:
        side = 16 // one.layer.factor
        assert one.weight.shape == one.concept.shape == (2, 2, side, side)
        assert one.weight.min() >= 0
        assert one.weight.max() <= 1


def test_the_generator_is_left_as_the_plain_pipeline_leaves_it(pipe):
    one, other = seeded(), seeded()
    pipe(PROMPT, generator=one, **FEW)
    pipe(PROMPT, generator=other, dci=False, **FEW)
    assert torch.equal(one.get_state(), other.get_state())
    assert not torch.equal(latents(pipe, generator=one), latents(pipe, generator=seeded()))


def test_nothing_is_left_behind(pipe):
    before = pipe.unet.attn_processors
    with pytest.raises(ZeroDivisionError):
        latents(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert all(a is b for a, b in zip(pipe.unet.attn_processors.values(), before.values(), strict=True))
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert pipe.auxiliary_latents is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agg_tim": 0.3}, "did you mean 'agg_time'"),
        ({"agg_time": 2}, "expected 0 .* to 1"),
        ({"layers": "attic"}, "layers 'attic': expected some of"),
        ({"num_inference_step": 3}, "did you mean 'num_inference_steps'"),
        ({"prompt": "a dog"}, "does not name the concept"),
        ({"ip_adapter_image": picture()}, "IP-Adapter"),
    ],
)
def test_mistakes_are_one_line(pipe, options, said):
    with pytest.raises(UserError, match=said) as caught:
        pipe(**{"prompt": PROMPT, **FEW, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_ip_adapter_is_refused(sd1):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = sd1.pipe()
    processors = {n: p for n, p in pipe.unet.attn_processors.items()}
    name = next(name for name in processors if "attn2" in name)
    processors[name] = IPAdapterAttnProcessor2_0(32, 64)
    pipe.unet.set_attn_processor(processors)
    with pytest.raises(UserError, match="IP-Adapter"):
        latents(pipe)


CHANGES = ["FreeU", "slicing", "fp16", "bf16", "fp8 storage", "compiled", "compiled in place"]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@apart
def test_what_users_switch_on(sd1, change):
    pipe = sd1.pipe()
    if change == "FreeU":
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    elif change == "slicing":
        pipe.enable_attention_slicing()
    elif change in ("fp16", "bf16"):
        pipe.to(dtype=torch.float16 if change == "fp16" else torch.bfloat16)
    elif change == "fp8 storage":  # each layer is cast as it runs
        if not hasattr(pipe.unet, "enable_layerwise_casting"):
            pytest.skip("the installed diffusers cannot")
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif change == "compiled":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    rough = 0.1 if change in ("fp16", "bf16") else 1e-5
    plain = latents(pipe, dci=False)
    assert relative_error(latents(pipe, agg_lambda=-1e6).float(), plain.float()) < rough
    if rough < 1e-3:
        assert relative_error(latents(pipe), plain) > 1e-5
    else:
        assert relative_error(latents(pipe).float(), latents(sd1.pipe())) < rough


@pytest.mark.slow
@apart
def test_a_compiled_unet_is_not_compiled_for_every_call(pipe):
    from torch._dynamo.testing import CompileCounter

    pipe = DCIPipeline.from_pipe(pipe)
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=counter, dynamic=False)
    latents(pipe)
    first = counter.frame_count
    latents(pipe, "a painting of a V* dog with a very long prompt in a bright red city street", agg_lambda=0.5)
    assert counter.frame_count <= 2 * first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
def test_offloading(sd1):
    pipe = sd1.pipe()
    expected = latents(pipe)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert relative_error(latents(pipe).cpu(), expected) < 1e-3


@pytest.mark.slow
def test_other_classes_are_refused(sd1):
    plain = sd1.plain()
    other = diffusers.DDIMPipeline(plain.unet, plain.scheduler)
    with pytest.raises(UserError, match="DDIMPipeline: expected one of StableDiffusionPipeline"):
        DCIPipeline.from_pipe(other)


@pytest.mark.slow
def test_the_example_runs_from_any_folder(tmp_path):
    """In a clone, without the package installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*options):
        command = [sys.executable, ROOT / "examples/diffusers_dci.py", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)

    done = run("--train-steps", "2")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "diffusers_dci.png").size == (4 * 64 + 3 * 2, 2 * 64 + 2)
    done = run("--concept", "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_module_needs_no_diffusers_and_nobody_else_needs_it():
    code = """
import sys
sys.modules["diffusers"] = None
from dci.diffusers import DCIPipeline
from ldm.errors import UserError
try:
    DCIPipeline.from_pretrained("somewhere")
except UserError as error:
    assert "[diffusers]'" in str(error), error
else:
    raise SystemExit("not refused")
import dci, dci.pipeline, dci.concept.foreign.export, dci.dual_branch.sampling
"""
    subprocess.run([sys.executable, "-c", code], check=True)
