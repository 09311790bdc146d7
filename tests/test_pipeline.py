"""The road of all sampling: options by name and type, notes, the gain, a concept in a negative prompt, words of programs."""

import re
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from dci.cli.arguments import as_options
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.sampling import BranchContexts
from dci.pipeline import Pipeline, Request
from ldm import config as configuration
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import Note, UserError
from ldm.unet import CrossLayer

IMAGE = Image.new("RGB", (64, 64), "red")


@pytest.fixture
def pipeline(finetuned):
    return Pipeline(*finetuned, {})


def readable(value):
    """A test's name without addresses in memory, which differ between the processes that run the tests."""
    return re.sub(r" at 0x\w+", "", str(value))[:60]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "a cat"}, "does not name the concept"),
        ({"prompt": 3}, "prompt 3: expected text"),
        ({"prompt": []}, "prompt \\[\\]: expected text"),
        ({"prompt": ["a V*", 3]}, "expected text, or a list of texts"),
        ({"step": 20}, "'step'; did you mean 'steps'"),
        ({"agg_tim": 0.5}, "did you mean 'agg_time'"),
        ({"zzz": 1}, "unknown option 'zzz': expected one of agg_lambda, agg_time, "),
        ({"call_back": print}, "did you mean 'callback'"),
        ({"init_img": IMAGE}, "did you mean 'init_image'"),
        ({"steps": "20"}, "steps '20': expected a whole number"),
        ({"steps": 20.0}, "steps 20.0: expected a whole number"),
        ({"steps": True}, "steps True: expected a whole number"),
        ({"seed": "1"}, "seed '1'"),
        ({"height": 64.5}, "height 64.5"),
        ({"scale": "6"}, "scale '6': expected a finite number"),
        ({"scale": float("inf")}, "scale inf"),
        ({"eta": None, "solver": 3}, "solver 3: expected text"),
        ({"zero_terminal_snr": 1}, "zero_terminal_snr 1: expected true or false"),
        ({"zero_terminal_snr": True}, "predicts noise"),
        ({"gain": 1e39}, "gain 1e\\+39: expected a finite number"),
        ({"agg_time": 2}, "agg_time 2"),
        ({"shared_noise": "False"}, "shared_noise 'False'"),
        ({"n": 0}, "n 0: expected 1 or more"),
        ({"n": "2"}, "n '2': expected a whole number"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"dci": "no"}, "dci 'no': expected true or false"),
        ({"negative": None}, "negative None: expected text"),
        ({"negative": "a V2*"}, "does not name the concept"),
        ({"prompt": "a V* caf\udce9"}, "the text ' caf\\\\udce9' is not UTF-8"),
        ({"auxiliary_noun": "caf\udce9"}, "the text 'caf\\\\udce9' is not UTF-8"),
        ({"auxiliary_noun": 3}, "auxiliary_noun 3: expected text"),
        ({"strength": 0.5}, "strength= needs an image to start from"),
        ({"mask": IMAGE}, "mask= needs an image to start from"),
        ({"init_image": "cat.png"}, "init_image 'cat.png': expected a PIL image"),
        ({"init_image": IMAGE, "strength": "0.5"}, "strength '0.5'"),
        ({"layers": "nowhere"}, "nowhere"),
        ({"layers": 3.5}, "layers 3.5: expected names"),
        ({"layers": [16, None]}, "layers \\[16, None\\]: expected names"),
        ({"layers": ()}, "layers: none is named"),
        ({"callback": 3}, "callback 3: expected a function"),
        ({"maps": "maps"}, "maps 'maps': expected a function"),
        ({"prompt": b"a V*"}, "prompt b'a V\\*': expected text"),
        ({"original_size": "64x64"}, "original_size 64x64: expected two whole numbers"),
        ({"crop": 5}, "crop 5: expected two whole numbers"),
        ({"vae_tile": "64"}, "vae_tile '64'"),
        ({"spacing": "even"}, "spacing 'even': expected leading"),
    ],
    ids=readable,
)
def test_what_the_pipeline_refuses(pipeline, options, words):
    with pytest.raises(UserError, match=words):
        pipeline(**{"prompt": "a V*", **options})


def test_a_request_refuses_what_the_call_does(pipeline):
    with pytest.raises(UserError, match="unknown option 'step'; did you mean 'steps'"):
        pipeline.prepare(Request("a V*", settings={"step": 20, "steps": 3}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concept": 3}, "concept 3: expected a file, or a list of files"),
        ({"concept": []}, "concept \\[\\]: expected a file"),
        ({"concept": ["none.safetensors", None]}, "expected a file, or a list of files"),
        ({"concept": b"none.safetensors"}, "expected a file, or a list of files"),
        ({"dtype": "fp16"}, "dtype 'fp16': expected a torch.dtype"),
        ({"strength_concept": "1"}, "strength_concept '1': expected a number"),
        ({"device": "nowhere"}, "device nowhere cannot be used here"),
        ({"device": "meta"}, "device meta cannot be used here"),
        ({"device": 0.5}, "device 0.5 cannot be used here"),
    ],
    ids=readable,
)
def test_what_loading_refuses(finetuned, tmp_path, options, words):
    finetuned[1].save(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=words):
        Pipeline.load(**{"concept": tmp_path / "c.safetensors", "model": ROOT / "configs/model/tiny.yaml", **options})


def test_numbers_of_numpy_are_numbers(pipeline):
    settings = {"steps": np.int64(20), "seed": np.int32(3), "scale": np.float32(2), "agg_time": np.float64(0.5)}
    prepared = pipeline.prepare(Request("a V*", settings=settings))
    assert (prepared.options.steps, prepared.options.seed, prepared.options.scale) == (20, 3, 2.0)
    assert all(type(value) in (int, float) for value in (prepared.options.steps, prepared.options.scale))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a V* (sitting:1.3)"), ["'\\(sitting:1.3\\)' weighs nothing"]),
        (Request("a V* in ((snow))"), ["weighs nothing"]),
        (Request("a V*", negative="[car:0.5]"), ["'\\[car:0.5\\]' weighs nothing"]),
        (Request("a V* <lora:style:0.8>"), ["'<lora:style:0.8>' loads nothing"]),
        (Request("a V* (a:2) <lora:b:1>"), ["<lora", "\\(a:2\\)"]),
        (Request("a V*", negative="a car", settings={"scale": 1}), ["negative prompt has no effect"]),
        (Request("a V*", init_image=IMAGE, strength=0.01), ["strength 0.01 leaves none of 50 steps"]),
        (Request("a V*", init_image=IMAGE, strength=0.0), ["strength 0 leaves none"]),
        (Request("a V*", settings={"agg_time": 0.001}), ["this is plain sampling; raise agg_time="]),
        (
            Request("a V*", settings={"agg_time": 0.3, "solver": "dpm++2m", "spacing": "leading", "steps": 334}),
            ["first timestep is 669"],
        ),
        (Request("a V* (a dog, small)", negative="a car"), []),
        (Request("a V*", settings={"agg_time": 0.0}), []),
        (Request("a V*", dci=False, settings={"agg_time": 0.001}), []),
        (Request("a V*", settings={"agg_time": 0.3, "solver": "dpm++2m", "steps": 334}), []),
    ],
    ids=readable,
)
def test_what_has_no_effect_is_noted(pipeline, request_, words):
    prepared = pipeline.prepare(request_)
    assert len(prepared.notes) == len(words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared.warn()
    for note, word in zip(caught, words, strict=True):
        assert note.category is Note
        with pytest.raises(UserError, match=word):
            raise UserError(str(note.message))


@pytest.mark.parametrize("request_", [Request("a V* dog"), Request("a dog", negative="{}"), Request("a <new1> dog")])
def test_a_concept_without_its_file_is_noted(tiny_base, request_):
    (note,) = Pipeline.of(tiny_base).prepare(request_).notes
    assert "names a concept, and there is none" in note


def test_the_concept_in_a_negative_prompt_means_the_concept(finetuned, pipeline):
    model, concept = finetuned
    prompts = [pipeline.parse("a photo of V*"), pipeline.parse("a V* on the beach")]
    contexts = BranchContexts.of(model, concept, prompts, "a photo of V*")
    torch.testing.assert_close(contexts.unconditional[1], contexts.concept[0])
    plain = BranchContexts.of(model, concept, prompts, "a photo of")
    expected = model.text_encoder.contexts(model.text_encoder.tokenize(["a photo of"]).tolist())
    torch.testing.assert_close(plain.unconditional[0], expected[0])


class Layered:
    """A model of Stable Diffusion's sizes without its weights."""

    def __init__(self, config: ModelConfig):
        self.config, self.unet = config, self
        self.factors = [2**i for i, _ in enumerate(config.unet.channel_mult) if 2**i in config.unet.attention_resolutions]

    def cross_layers(self):
        return [CrossLayer("input_blocks.1.1", "input", factor) for factor in self.factors]

    latent_shape = LatentDiffusion.latent_shape


@pytest.mark.parametrize(
    ("model", "size", "gain"),
    [
        ("sd-v1", {}, 500),
        ("sd-v1", {"height": 768, "width": 512}, 750),
        ("sd-v1", {"height": 256, "width": 256}, 125),
        ("sd-v2", {}, 500),
        ("sd-v2-v", {}, 1125),
        ("sd-v2-v", {"height": 512, "width": 512}, 500),
        ("sdxl", {}, 500),
        ("sdxl", {"height": 832, "width": 1216}, 500 * 52 * 76 / 4096),
        ("sdxl", {"height": 512, "width": 512}, 125),
        ("tiny", {}, 31),
        ("tiny", {"height": 128, "width": 128}, 124),
        ("tiny", {"width": 128}, 62),
        ("tiny", {"height": 128, "gain": 7.0}, 7),
    ],
)
def test_the_gain_follows_the_finest_layer_of_the_size(model, size, gain):
    config = configuration.load(ModelConfig, ROOT / f"configs/model/{model}.yaml")
    assert dual_branch(Layered(config), **size).gain == gain


@pytest.mark.parametrize(("size", "gain"), [({}, 31), ({"height": 128}, 62), ({"gain": 3}, 3), ({"init_image": IMAGE}, 31)])
def test_the_pipelines_gain_follows_the_size_of_its_images(pipeline, size, gain):
    image = size.pop("init_image", None)
    assert pipeline.prepare(Request("a V*", init_image=image, settings=size)).dual.gain == gain


@pytest.mark.parametrize("zero", [{"zero_terminal_snr": True}, {}])
def test_zero_terminal_snr_of_a_noise_prediction_is_refused(tiny_base, zero):
    import copy
    import dataclasses

    model = copy.copy(tiny_base)
    if not zero:  # the model's own schedule
        schedule = dataclasses.replace(tiny_base.config.schedule, zero_terminal_snr=True)
        model.config = dataclasses.replace(tiny_base.config, schedule=schedule)
    with pytest.raises(UserError, match="zero_terminal_snr: the model 'tiny' predicts noise"):
        sampling_options(model, **zero)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("agg_time 2: expected 0 to 1", "--agg-time 2: expected 0 to 1"),
        ("height 50: expected a multiple of 16", "--H 50: expected a multiple of 16"),
        (
            "note: strength 0.01 leaves none; raise strength= or steps=",
            "note: strength 0.01 leaves none; raise --strength or --steps",
        ),
        ("give the right one as model= and checkpoint=", "give the right one as --model and --checkpoint"),
        ("zero_terminal_snr: the model predicts noise", "--zero-terminal-snr: the model predicts noise"),
        ("no folder steps 3: none", "no folder steps 3: none"),
        ("training.steps=3 and model=x", "training.steps=3 and model=x"),
        ("the model 'tiny' (steps): no", "the model 'tiny' (steps): no"),
    ],
)
def test_programs_name_options_as_they_are_typed(message, words):
    assert as_options(message) == words
