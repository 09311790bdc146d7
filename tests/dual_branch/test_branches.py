"""DCI in full: both branches with every solver, guidance, task, layer and weight."""

import copy
import dataclasses

import pytest
import torch
from helpers import mostly_slow, sample_images
from PIL import Image

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch
from dci.dual_branch.layer_selection import integrated_layers
from dci.dual_branch.options import dual_branch, sampling_options
from ldm.config import UNetConfig
from ldm.errors import UserError
from ldm.init_image import InitImage, begin
from ldm.noise import ImageNoise
from ldm.sampling_loop import solve
from ldm.solvers import SOLVERS
from ldm.text_to_image import guided, make_solver
from ldm.unet import UNet

TOKENS = ("<new1>", "<new2>")
PROMPT = parse_prompt("a V* cat on the beach", ConceptName(TOKENS, "cat"))
OTHER = parse_prompt("two red V* cats in space", ConceptName(TOKENS, "cat"))
ONE = -1e6  # a lambda so negative that w_c rounds to 1
ROUNDING = 1e-4  # of pixels: batches of other sizes round differently, and guidance and decoder magnify that


@pytest.fixture(scope="module")
def base(finetuned, tiny_base):
    """The weights that the concept replaced."""
    return finetuned[1].replaced(tiny_base)


def sampled(finetuned, dual, prompt=PROMPT, indices=(0,), options=None, **more):
    model, concept = finetuned
    options = options or sampling_options(model, steps=4)
    return sample_images(model, concept, prompt, list(indices), options, dual, **more)


def half_an_image(model):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return InitImage.of(model, Image.effect_noise((64, 64), 90).convert("RGB"), 64, 64, 0.9, mask)


# A weight of one.


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_of_one_is_plain_sampling_of_a_v_prediction(finetuned, solver):
    model, concept = finetuned
    model = copy.deepcopy(model)
    model.config.schedule = dataclasses.replace(model.config.schedule, parameterization="v")
    options = sampling_options(model, steps=6, solver=solver)
    plain = sampled((model, concept), None, options=options)
    # Rows of a larger batch are rounded otherwise, how much depends on the machine.
    assert (sampled((model, concept), DualBranch(0.5, ONE), options=options) - plain).abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    mostly_slow(
        [
            {"scale": 1.0},
            {"shared_guidance": False},
            {"shared_noise": True},
            {"auxiliary_weights": "base"},
            {"layers": ["middle"]},
        ],
        {"auxiliary_weights": "base"},
    ),
    ids=str,
)
def test_a_weight_of_one_is_plain_sampling_in_every_mode(finetuned, base, settings):
    model = finetuned[0]
    settings = dict(settings)
    options = sampling_options(model, steps=6, scale=settings.pop("scale", 4.0))
    more = {"options": options, "negative": "a car", "init": half_an_image(model), "base": base}
    plain = sampled(finetuned, None, **more)
    dual = dual_branch(model, agg_time=0.6, **settings)
    assert (sampled(finetuned, dataclasses.replace(dual, agg_lambda=ONE), **more) - plain).abs().max() < ROUNDING
    assert (sampled(finetuned, dataclasses.replace(dual, agg_lambda=2.0), **more) - plain).abs().max() > 0.005


@pytest.mark.slow
def test_several_concepts_in_a_prompt(finetuned):
    names = (ConceptName(("<new1>",), "cat"), ConceptName(("<new2>",), "car"))
    prompt = parse_prompt("a V1* cat and a V2* car in the snow", names)
    plain = sampled(finetuned, None, prompt)
    assert (sampled(finetuned, DualBranch(1.0, ONE), prompt) - plain).abs().max() < ROUNDING
    assert (sampled(finetuned, dual_branch(finetuned[0], agg_time=1.0, agg_lambda=1.0), prompt) - plain).abs().max() > 0.02


@pytest.mark.slow
def test_rows_of_different_prompts_are_sampled_as_alone(finetuned):
    dual = dual_branch(finetuned[0], agg_time=0.6)
    together = sampled(finetuned, dual, [PROMPT, OTHER], (3, 5))
    for row, (prompt, index) in enumerate([(PROMPT, 3), (OTHER, 5)]):
        assert (sampled(finetuned, dual, prompt, [index]) - together[row]).abs().max() < 1e-4
    with pytest.raises(UserError, match="2 prompts for 1 images"):
        sampled(finetuned, dual, [PROMPT, OTHER], [0])


# The auxiliary branch by itself.


@pytest.mark.parametrize("solver", mostly_slow(SOLVERS, "dpm++2m"))
def test_the_auxiliary_branch_is_the_base_model(finetuned, base, tiny_base, solver):
    """With the base's weights and guidance of its own, it takes the base model's way from its own noise."""
    options = sampling_options(tiny_base, steps=5, solver=solver)
    dual = DualBranch(1.0, 0.5, 31.0, shared_guidance=False, auxiliary_weights="base")
    seen = []
    sampled(finetuned, dual, indices=(0, 1), options=options, callback=seen.append, base=base, negative="a car")

    plain = make_solver(tiny_base, options)
    noise = ImageNoise(options.seed, [0, 1], tiny_base.latent_shape(64, 64), stream=1)
    contexts = tiny_base.text_encoder(["a car"] * 2 + ["a cat on the beach"] * 2).chunk(2)
    expected = []
    with torch.inference_mode():
        x, _ = begin(None, plain, noise())
        solve(
            plain,
            guided(tiny_base, *contexts, options.scale),
            x,
            range(len(plain.timesteps)),
            noise=noise,
            callback=expected.append,
        )
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        # At timestep 0, where only Karras et al.'s levels go, the concept branch is alone even with T_a = 1.
        if theirs["t"]:
            torch.testing.assert_close(ours["x"][1], theirs["x"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", mostly_slow(SOLVERS, "ddim"))
@pytest.mark.parametrize("settings", mostly_slow([{"shared_guidance": False}, {"scale": 1.0}], {"scale": 1.0}), ids=str)
def test_the_auxiliary_trajectory_does_not_depend_on_the_concept(finetuned, solver, settings):
    """Bitwise, whatever the concept's prompt."""
    model = finetuned[0]
    options = sampling_options(model, steps=4, solver=solver, scale=settings.get("scale"))
    dual = dual_branch(model, agg_time=1.0, shared_guidance=settings.get("shared_guidance"))
    trajectories = []
    for prompt in (PROMPT, dataclasses.replace(PROMPT, concept_ids=OTHER.concept_ids)):
        seen = []
        sampled(finetuned, dual, prompt, options=options, callback=seen.append)
        trajectories.append([step["x"] for step in seen if step["x"].dim() == 5])
    assert len(trajectories[0]) >= 3
    for a, b in zip(*trajectories, strict=True):
        assert torch.equal(a[1], b[1])
        assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize(
    "settings",
    mostly_slow([{}, {"shared_guidance": False}, {"auxiliary_weights": "base"}, {"layers": ["8"]}], {}),
    ids=str,
)
def test_no_row_but_the_concepts_sees_another(finetuned, base, settings, monkeypatch):
    """The UNet's outputs for given rows: the concept rows listen to the auxiliary rows, no others to any."""
    model, _ = finetuned
    calls = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda *call: calls.append(call) or predict(*call))
    sampled(finetuned, dual_branch(model, **settings), base=base)
    x, t, text, attends = calls[0]
    rows = x.chunk(len(x))
    with torch.inference_mode():
        outputs = predict(*calls[0]).chunk(len(rows))
        for changed in range(len(rows)):
            moved = list(rows)
            moved[changed] = torch.randn_like(rows[changed])
            now = predict(torch.cat(moved), t, text, attends).chunk(len(rows))
            differs = {i for i in range(len(rows)) if not torch.equal(now[i], outputs[i])}
            assert differs == ({changed, 1} if changed == len(rows) - 1 else {changed})


# Noise, weights, layers.


def test_shared_noise_starts_both_branches_alike(finetuned, monkeypatch):
    model, _ = finetuned
    first = {}
    predict = model.predict
    for shared in (False, True):
        rows = []
        monkeypatch.setattr(model, "predict", lambda x, *more, rows=rows: rows.append(x) or predict(x, *more))
        sampled(finetuned, dual_branch(model, shared_noise=shared))
        first[shared] = rows[0].chunk(3)
    assert torch.equal(first[True][1], first[True][2])
    assert not torch.equal(first[False][1], first[False][2])
    assert torch.equal(first[True][1], first[False][1])


def test_the_base_models_weights_are_asked_for(finetuned, base):
    dual = dual_branch(finetuned[0], agg_time=0.6, agg_lambda=1.0, auxiliary_weights="base")
    other = dataclasses.replace(dual, auxiliary_weights="finetuned")
    assert (sampled(finetuned, dual, base=base) - sampled(finetuned, other, base=base)).abs().max() > 0.01
    with pytest.raises(UserError, match="auxiliary_weights=base needs the base model's weights"):
        sampled(finetuned, dual)
    with pytest.raises(UserError, match="auxiliary_weights 'adapter': expected finetuned or base"):
        dual_branch(finetuned[0], auxiliary_weights="adapter")


@torch.no_grad()
def test_keys_and_values_stand_for_their_context(tiny_base):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([500, 20])
    context = tiny_base.text_encoder(["a cat on the beach", "a red car"])
    torch.testing.assert_close(tiny_base.predict(x, t, tiny_base.keys_values(context)), tiny_base.predict(x, t, context))
    layer = tiny_base.unet.cross_layers()[4]
    name = f"model.diffusion_model.{layer.name}.attn2.to_v.weight"
    doubled = tiny_base.keys_values(context, {name: 2 * tiny_base.state_dict()[name]})
    for i, (new, old) in enumerate(zip(doubled, tiny_base.keys_values(context), strict=True)):
        torch.testing.assert_close(new.values, (2 if i == 4 else 1) * old.values)
        assert torch.equal(new.keys, old.keys)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (None, range(10)),
        (["input", "middle", "output"], range(10)),
        (["input"], [0, 1, 2]),
        (["middle"], [3]),
        (["16"], [0, 8, 9]),
        (["8", "layer3"], [1, 3, 6, 7]),
        (["Output_Blocks.3"], [7]),
        (["input_blocks.1"], [0]),
        (["model.diffusion_model.middle_block"], [3]),
        (["4", "middle"], [2, 3, 4, 5]),
    ],
    ids=str,
)
def test_layers_by_their_names(tiny_base, names, chosen):
    found = integrated_layers(tiny_base.unet, names and tuple(names), (16, 24))
    assert [i for i, on in enumerate(found) if on] == list(chosen)


def test_layers_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    numbers = {n: sum(integrated_layers(unet, (n,), (64, 64))) for n in ("64", "32", "16", "8", "input", "middle", "output")}
    assert numbers == {"64": 5, "32": 5, "16": 5, "8": 1, "input": 6, "middle": 1, "output": 9}
    assert integrated_layers(unet, ("96",), (96, 128)) == integrated_layers(unet, ("64",), (64, 64))


@pytest.mark.parametrize("name", ["mid", "32", "layer10", "input_blocks.", "output_blocks.9", ""])
def test_unknown_layers_are_named(finetuned, name):
    known = r"input, middle, output; the resolutions 16, 8, 4; layer0 \(input_blocks.1.1\) to layer9 \(output_blocks.5.1\)"
    with pytest.raises(UserError, match=f"'{name}': expected some of {known}"):
        sampled(finetuned, dual_branch(finetuned[0], layers=f"middle,{name}"))


@pytest.mark.slow
def test_integration_happens_in_the_chosen_layers(finetuned):
    model, _ = finetuned
    images = {}
    for layers in (None, "16,8,4", "8", "middle,16"):
        seen = []
        dual = dual_branch(model, agg_time=0.6, agg_lambda=1.0, layers=layers)
        images[layers] = sampled(finetuned, dual, maps=seen.append)
        sides = {"8": {8}, "middle,16": {4, 16}}.get(layers, {4, 8, 16})
        assert {m.weight.shape[-1] for m in seen} == sides
    assert torch.equal(images[None], images["16,8,4"])
    assert (images[None] - images["8"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"agg_time": -0.01}, "agg_time -0.01: expected 0"),
        ({"agg_time": 1.01}, "agg_time 1.01"),
        ({"agg_lambda": float("nan")}, "agg_lambda nan: expected a finite number"),
        ({"gain": "high"}, "gain 'high'"),
        ({"token_sharpness": -1.0}, "token_sharpness -1.0"),
        ({"pixel_sharpness": -1.0}, "pixel_sharpness -1.0"),
        ({"shared_noise": "False"}, "shared_noise 'False': expected true or false"),
        ({"sharpness": 3}, "unknown option 'sharpness'; did you mean 'token_sharpness'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(tiny_base, settings, words):
    with pytest.raises(UserError, match=words):
        dual_branch(tiny_base, **settings)


@pytest.mark.parametrize("name", mostly_slow(["token_sharpness", "pixel_sharpness", "gain"], "gain"))
def test_constants_have_an_effect(finetuned, name):
    duals = [dual_branch(finetuned[0], agg_time=0.6, agg_lambda=0.5, **{name: value}) for value in (3.0, 60.0)]
    assert (sampled(finetuned, duals[0]) - sampled(finetuned, duals[1])).abs().max() > 0.005
