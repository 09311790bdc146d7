"""Solver and samplers: closed forms, diffusers' scheduler, and the laws of the two branches."""

import dataclasses
import itertools

import pytest
import torch
from helpers import mostly_slow, sample_images
from PIL import Image

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch, TokenMasks, concept_weight, integrating_attend
from dci.dual_branch.options import dual_branch, sampling_options
from ldm.attention import attend, attention_maps
from ldm.config import ScheduleConfig
from ldm.errors import UserError
from ldm.init_image import InitImage
from ldm.noise import ImageNoise
from ldm.sampling_loop import solve
from ldm.schedule import alphas_cumprod, leading_timesteps, q_sample, split_output, training_target
from ldm.solvers import DDIM, SOLVERS
from ldm.text_to_image import text_to_image

ALPHAS = alphas_cumprod(ScheduleConfig())


def test_ddim_with_the_true_noise_returns_to_the_image():
    x_0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    solver = DDIM(ALPHAS, 20)
    first = q_sample(x_0, noise, ALPHAS[solver.timesteps[:1]])
    last, _ = solve(solver, lambda x, t: noise, first, range(20))
    torch.testing.assert_close(last, q_sample(x_0, noise, ALPHAS[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_targets_and_outputs_are_inverse(prediction):
    x_0, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    alpha = ALPHAS[[500, 500]].double()
    output = training_target(x_0, noise, alpha, prediction)
    found = split_output(output, q_sample(x_0, noise, alpha), float(alpha[0]), prediction)
    torch.testing.assert_close(found, (x_0, noise))


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 300, 999, 1000])
def test_timesteps(steps):
    visited = leading_timesteps(steps)
    assert len(visited) == steps
    assert visited == sorted(set(visited), reverse=True)
    assert 0 <= visited[-1] <= 1
    assert visited[0] < 1000


@pytest.mark.parametrize("steps", [0, 1001, -5])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match="1 to 1000"):
        leading_timesteps(steps)


def test_noise_belongs_to_the_image():
    together = ImageNoise(7, [0, 1, 2], (4, 8, 8))
    alone = ImageNoise(7, [2], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(together()[2:], alone())
    assert not torch.equal(ImageNoise(7, [0], (4,))(), ImageNoise(8, [0], (4,))())
    assert not torch.equal(ImageNoise(7, [0], (4,))(), ImageNoise(7, [0], (4,), stream=1)())
    many = ImageNoise(0, list(range(200)), (4, 16, 16))()
    assert abs(many.mean().item()) < 0.01
    assert abs(many.std().item() - 1) < 0.01
    assert torch.corrcoef(many.flatten(1)).fill_diagonal_(0).abs().max() < 0.15


# The integration module.


def two_prompts():
    return [
        parse_prompt("a V* dog on the beach", ConceptName(("<new1>", "<new2>"), "dog")),
        parse_prompt("V* in a red city street at night", ConceptName(("<new1>", "<new2>"), "dog"), "cat"),
    ]


def test_rows_of_different_prompts_equal_each_alone():
    prompts = two_prompts()
    maps = [torch.softmax(3 * torch.randn(2, 4, 16, 77), dim=-1) for _ in range(2)]
    dual = DualBranch(agg_lambda=0.7, gain=30)
    together = concept_weight(*maps, TokenMasks.of(prompts), dual)
    for i, prompt in enumerate(prompts):
        alone = concept_weight(maps[0][i : i + 1], maps[1][i : i + 1], TokenMasks.of([prompt]), dual)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_weight_of_uniform_attention_is_known():
    """With the same map at every pixel the normalised evidence is gain / pixels, whatever the map."""
    maps = torch.softmax(torch.randn(1, 2, 1, 77), dim=-1).expand(-1, -1, 25, -1)
    for agg_lambda in (0.0, 0.5, -2.0):
        weight = concept_weight(maps, maps, TokenMasks.of(two_prompts()[:1]), DualBranch(agg_lambda=agg_lambda, gain=50))
        expected = torch.sigmoid(torch.tensor(50 / 25 * (1 - agg_lambda)))
        torch.testing.assert_close(weight, expected.expand_as(weight))


def test_more_lambda_is_less_concept():
    maps = [torch.softmax(3 * torch.randn(1, 4, 16, 77), dim=-1) for _ in range(2)]
    masks = TokenMasks.of(two_prompts()[:1])
    weights = [concept_weight(*maps, masks, DualBranch(agg_lambda=x, gain=30)) for x in (-2, 0, 1, 2)]
    assert all((a >= b).all() for a, b in zip(weights, weights[1:], strict=False))
    assert (weights[1] > 0.5).all()


def test_only_the_concept_rows_are_touched():
    q, k, v = torch.randn(6, 2, 16, 8), torch.randn(6, 2, 77, 8), torch.randn(6, 2, 77, 8)
    masks = TokenMasks.of(two_prompts())
    out = integrating_attend(masks, DualBranch(gain=5), slice(2, 4), slice(4, 6))(q, k, v)
    plain = attend(q, k, v)
    assert torch.equal(out[:2], plain[:2])
    assert torch.equal(out[4:], plain[4:])
    assert not torch.allclose(out[2:4], plain[2:4])
    torch.testing.assert_close(attention_maps(q, k) @ v, plain)


def test_gain_and_lambda_at_their_ends_choose_a_branch():
    q, k, v = torch.randn(3, 2, 16, 8), torch.randn(3, 2, 77, 8), torch.randn(3, 2, 77, 8)
    masks, plain = TokenMasks.of(two_prompts()[:1]), attend(q, k, v)
    for agg_lambda, chosen in ((-1e6, 1), (1e6, 2)):
        out = integrating_attend(masks, DualBranch(agg_lambda=agg_lambda), slice(1, 2), slice(2, 3))(q, k, v)
        assert torch.equal(out[1], plain[chosen])


# Whole images, with the embedded model.


PROMPT = parse_prompt("a V* cat on the beach", ConceptName(("<new1>", "<new2>"), "cat"))


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_a_weight_of_one_is_plain_sampling(finetuned, eta, shared):
    model, concept = finetuned
    options = sampling_options(model, steps=20, eta=eta)
    plain = sample_images(model, concept, PROMPT, [0, 1], options, None)
    dual = dual_branch(model, agg_lambda=-1e6, shared_guidance=shared)
    assert (sample_images(model, concept, PROMPT, [0, 1], options, dual) - plain).abs().max() < 1e-5
    different = sample_images(model, concept, PROMPT, [0, 1], options, dual_branch(model))
    assert (different - plain).abs().max() > 0.05


@pytest.mark.parametrize(("from_image", "solver"), mostly_slow(itertools.product([False, True], SOLVERS), (True, "dpm++2m")))
def test_a_weight_of_one_is_plain_sampling_with_every_solver(finetuned, from_image, solver):
    """Also from an image, half of it kept."""
    model, concept = finetuned
    options = sampling_options(model, steps=8, solver=solver)
    init = None
    if from_image:
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        init = InitImage.of(model, Image.effect_noise((64, 64), 90).convert("RGB"), 64, 64, 0.9, mask)

    def sampled(dual):
        return sample_images(model, concept, PROMPT, [0, 1], options, dual, negative="a car", init=init)

    plain = sampled(None)
    assert (sampled(dual_branch(model, agg_lambda=-1e6, agg_time=0.5)) - plain).abs().max() < 1e-5
    assert (sampled(dual_branch(model, agg_lambda=1.0, agg_time=0.5)) - plain).abs().max() > 0.02


def test_no_aggregation_time_is_plain_sampling(finetuned):
    model, concept = finetuned
    options = sampling_options(model, steps=5)
    plain = sample_images(model, concept, PROMPT, [3], options, None)
    assert torch.equal(sample_images(model, concept, PROMPT, [3], options, dual_branch(model, agg_time=0.0)), plain)


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(finetuned):
    model, concept = finetuned
    options = sampling_options(model, steps=10, eta=0.5)
    together = sample_images(model, concept, PROMPT, [0, 1, 2], options, dual_branch(model))
    alone = sample_images(model, concept, PROMPT, [2], options, dual_branch(model))
    assert (together[2:] - alone).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dci", [True, False])
def test_a_batch_may_hold_different_prompts_and_seeds(finetuned, dci):
    """Each row is what it is alone, whatever the lengths of the others' prompts."""
    model, concept = finetuned
    options = sampling_options(model, steps=4, eta=0.5, seed=3)
    dual = dual_branch(model, agg_lambda=0.7, agg_time=0.6) if dci else None
    texts = ("V*", "a V* cat on the beach", "a small image of a V* in a red city street at night, with two dogs and a car")
    prompts = [parse_prompt(text, ConceptName(("<new1>", "<new2>"), "cat"), "dog") for text in texts]
    indices, seeds = [4, 0, 2], [3, 9, 3]
    together = sample_images(model, concept, prompts, indices, options, dual, seeds=seeds)
    for row, prompt, index, seed in zip(together, prompts, indices, seeds, strict=True):
        alone = sample_images(model, concept, prompt, [index], dataclasses.replace(options, seed=seed), dual)
        assert (row - alone[0]).abs().max() < 1e-4
    with pytest.raises(UserError, match="3 prompts for 2 images"):
        sample_images(model, concept, prompts, [0, 1], options, dual)


@pytest.mark.slow
def test_plain_batches_may_hold_different_prompts_and_seeds(tiny_base):
    options = sampling_options(tiny_base, steps=4)
    prompts = ["a dog", "a very small red car in a street of a city at night"]
    together = text_to_image(tiny_base, prompts, [5, 5], options, seeds=[0, 1], negative="a house")
    for row, prompt, seed in zip(together, prompts, (0, 1), strict=True):
        alone = text_to_image(tiny_base, prompt, [5], dataclasses.replace(options, seed=seed), negative="a house")
        assert (row - alone[0]).abs().max() < 1e-4


def test_the_number_of_dual_steps(finetuned, monkeypatch):
    """T_a = 0.3 of 50 steps: the 15 steps whose timestep is above 700."""
    model, concept = finetuned
    monkeypatch.setattr(model, "predict", lambda x, *_: torch.zeros_like(x))  # what is predicted does not matter
    seen = []
    sample_images(
        model, concept, PROMPT, [0], sampling_options(model, steps=50), dual_branch(model, agg_time=0.3), seen.append
    )
    dual = [step["t"] for step in seen if step["x"].dim() == 5]
    assert dual == list(range(981, 700, -20))
    assert len(seen) == 50


@pytest.mark.slow
def test_the_auxiliary_branch_never_sees_the_concept_branch(finetuned):
    """With guidance of its own, its latents are those of plain sampling of its prompt from its noise."""
    model, concept = finetuned
    options = sampling_options(model, steps=6)
    dual = dual_branch(model, agg_time=1.0, shared_guidance=False)
    first, second = [], []
    sample_images(model, concept, PROMPT, [0], options, dual, first.append)
    other = dataclasses.replace(PROMPT, concept_ids=PROMPT.auxiliary_ids[:1] + PROMPT.concept_ids[2:] + (49407,))
    sample_images(model, concept, other, [0], options, dual, second.append)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a["x"][1], b["x"][1], atol=1e-5)
        if a["i"]:
            assert not torch.allclose(a["x"][0], b["x"][0], atol=1e-3)


def test_guidance_of_one_runs(finetuned):
    model, concept = finetuned
    options = sampling_options(model, steps=4, scale=1.0)
    assert sample_images(model, concept, PROMPT, [0], options, dual_branch(model)).isfinite().all()
    assert text_to_image(model, "a dog", [0], options).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("size", [{"height": 60}, {"width": 8}, {"height": 65}])
def test_impossible_sizes(tiny_base, size):
    with pytest.raises(UserError, match="multiple of 16"):
        text_to_image(tiny_base, "a dog", [0], sampling_options(tiny_base, **size))


def test_other_sizes_than_square(tiny_base):
    pixels = text_to_image(tiny_base, "a dog", [0], sampling_options(tiny_base, steps=2, height=48, width=80))
    assert pixels.shape == (1, 3, 48, 80)


@pytest.mark.parametrize(("settings", "value"), [("agg_time", 1.5), ("agg_time", -0.1), ("eta", 2.0)])
def test_settings_out_of_range(tiny_base, settings, value):
    make = sampling_options if settings == "eta" else dual_branch
    with pytest.raises(UserError, match=settings):
        make(tiny_base, **{settings: value})
