"""Scores against closed forms, torchmetrics and SciPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from dci.evaluation import metrics
from dci.evaluation.bootstrap import bootstrap_mean, factors, weights
from dci.evaluation.plots import pareto_front
from dci.evaluation.scores import ImageScore, Scores, difference, pool, summarize
from dci.evaluation.scoring_metadata import ScoringMetadata
from ldm.errors import UserError


def test_text_and_image_scores_are_cosines():
    images = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    texts = torch.tensor([[10.0, 0.0], [0.0, 7.0]])
    torch.testing.assert_close(metrics.text_scores(images, texts), torch.tensor([0.6, -1.0]))
    torch.testing.assert_close(metrics.scaled_text_scores(torch.tensor([0.6, -1.0])), torch.tensor([1.5, 0.0]))
    references = torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(metrics.image_scores(images, references), torch.tensor([0.7, -0.5]))


class Features(nn.Module):
    """Takes features for images."""

    num_features = 24

    def forward(self, x):
        return x


@pytest.mark.parametrize(("real", "fake", "subset_size"), [(40, 30, 12), (30, 30, 30)])
def test_kid_is_that_of_torchmetrics(real, fake, subset_size):
    real, fake = torch.randn(real, 24).double(), 0.7 * torch.randn(fake, 24).double() + 0.3
    theirs = KernelInceptionDistance(feature=Features(), subsets=7, subset_size=subset_size).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    torch.manual_seed(3)
    mean, std = theirs.compute()
    ours = metrics.kid(real, fake, subsets=7, subset_size=subset_size, seed=3)
    assert ours.mean == pytest.approx(mean.item(), rel=1e-6)
    assert ours.std == pytest.approx(std.item(), rel=1e-4, abs=1e-9)


def test_kid_takes_no_larger_subsets_than_there_are_images():
    real = torch.randn(6, 24)
    assert metrics.kid(real, torch.randn(9, 24)).subset_size == 6
    with pytest.raises(UserError, match="2 or more"):
        metrics.kid(real, real[:1])


def test_the_interval_of_kid_holds_no_pairs_of_an_image_with_itself():
    """Under resampling whole prompts, the resample that holds each prompt once is KID itself; and for samples
    of one distribution the interval is around zero, where pairing copies would push it up."""
    real, fake = torch.randn(60, 16), torch.randn(60, 16)
    prompts = {"prompt": [str(i) for i in range(60)]}
    value = metrics.kid(real, fake, subsets=1, subset_size=60)
    interval = metrics.kid_interval(real, fake, prompts, value, 400, 0)
    assert interval.low < value.mean < interval.high
    assert interval.low < 0 < interval.high
    middle = (interval.low + interval.high) / 2
    assert abs(middle - value.mean) < 0.5 * (interval.high - interval.low)


def scipy_interval(values, rng=0, level=0.95, resamples=999):
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(rng) if isinstance(rng, int) else rng,
    )
    return tuple(found.confidence_interval)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_one_factor_is_scipys_percentile_bootstrap(level):
    values = np.random.default_rng(1).normal(size=17)
    ours = bootstrap_mean(values, {"prompt": [str(i) for i in range(17)], "seed": ["0"] * 17}, 999, 0, level)
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(scipy_interval(values, level=level), rel=1e-12)


def crossed(prompts, seeds):
    """Labels of a full grid of prompts and seeds, prompt by prompt."""
    every = [(i, j) for i in range(prompts) for j in range(seeds)]
    return {"prompt": [f"p{i}" for i, _ in every], "seed": [f"s{j}" for _, j in every]}


def test_two_factors_with_an_effect_of_one_are_scipys_bootstrap_of_its_means():
    """Where only prompts matter, however many seeds there are, the interval is that of the prompts' values; and so
    with seeds, which are drawn from the second generator."""
    a, b = np.random.default_rng(2).normal(size=6), np.random.default_rng(3).normal(size=9)
    by_prompt = bootstrap_mean(np.repeat(a, 9), crossed(6, 9), 999)
    assert (by_prompt.low, by_prompt.high) == pytest.approx(scipy_interval(a), rel=1e-9)
    by_seed = bootstrap_mean(np.tile(b, 6), crossed(6, 9), 999)
    assert (by_seed.low, by_seed.high) == pytest.approx(scipy_interval(b, np.random.default_rng(0).spawn(1)[0]), rel=1e-9)


def test_intervals_over_prompts_and_seeds_hold_the_truth_where_those_over_images_do_not():
    """Random effects of 20 prompts and 8 seeds around a true mean of 0: 95 % of the intervals should hold it."""
    rng, held, naive, rounds = np.random.default_rng(0), 0, 0, 150
    for _ in range(rounds):
        values = (rng.normal(size=(20, 1)) + rng.normal(size=(1, 8)) + rng.normal(size=(20, 8))).ravel()
        two = bootstrap_mean(values, crossed(20, 8), 400)
        one = bootstrap_mean(values, {"image": [str(i) for i in range(160)]}, 400)
        held += two.low <= 0 <= two.high
        naive += one.low <= 0 <= one.high
    assert held / rounds > 0.87
    assert naive / rounds < 0.6


def test_factors_of_one_level_and_nested_ones_are_left_out():
    prompts = ["a", "a", "b", "b"]
    assert list(factors({"concept": [""] * 4, "prompt": prompts, "seed": ["0", "1", "0", "1"]})) == ["prompt", "seed"]
    assert list(factors({"prompt": prompts, "seed": ["0", "1", "2", "3"]})) == ["prompt"]
    assert list(factors({"prompt": ["a"] * 4, "seed": ["0", "1", "2", "3"]})) == ["seed"]
    assert list(factors({"prompt": ["a"] * 4, "seed": ["0"] * 4})) == ["image"]


def test_a_single_image_has_no_interval():
    one = bootstrap_mean([0.4], {"prompt": ["a"]})
    assert one.mean == 0.4
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def scores(values, concept=""):
    """Scores of a grid: values (prompts, seeds)."""
    rows = tuple(
        ImageScore(f"{i}-{j}.png", f"p{i}", f"p{i}", f"0:{j}", {"clip_t": float(v)}, concept)
        for i, row in enumerate(np.asarray(values))
        for j, v in enumerate(row)
    )
    return Scores(rows, summarize(rows, 499), ScoringMetadata(images=len(rows)))


def test_pairing_takes_out_what_prompts_and_seeds_do_to_both():
    base = 5 * np.random.default_rng(0).normal(size=(6, 4))
    better = difference(scores(base + 0.1), scores(base), 499)["clip_t"]
    assert better.mean == pytest.approx(0.1)
    assert better.low == pytest.approx(0.1)
    unpaired = scores(base).summary["clip_t"]
    assert unpaired.high - unpaired.low > 1


def test_a_difference_is_taken_of_the_images_that_both_have():
    base = np.arange(12.0).reshape(3, 4)
    fewer = Scores(scores(base).rows[:7], {})
    assert difference(fewer, scores(base + 1))["clip_t"].n == 7
    stranger = Scores(tuple(ImageScore("x", "other", "other", "0:0", {"clip_t": 1.0}) for _ in range(2)), {})
    with pytest.raises(UserError, match="no image of the same prompt and seed"):
        difference(stranger, scores(base))


def test_pooled_concepts_are_a_factor():
    parts = {"cat": scores(np.zeros((3, 2))), "dog": scores(np.ones((3, 2))), "car": scores(np.full((3, 2), 2.0))}
    whole = pool(parts, 999)
    assert len(whole.rows) == 18
    assert whole.metadata.resampled == {"concept": 3, "prompt": 3, "seed": 2}
    one = whole.summary["clip_t"]
    assert (one.mean, one.low, one.high) == pytest.approx((1, *scipy_interval(np.arange(3.0))))


def test_scores_survive_a_file(tmp_path):
    one = scores([[0.25]])
    one.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again.rows == one.rows
    assert math.isnan(again.summary["clip_t"].low)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="bad.json"):
        Scores.load(tmp_path / "bad.json")


def test_the_pareto_front_is_what_nothing_beats():
    points = [(0.0, 3.0), (1.0, 2.0), (0.5, 1.0), (2.0, 0.0), (1.0, 2.0), (2.0, -1.0)]
    assert pareto_front(points) == [0, 1, 4, 3]


@pytest.mark.parametrize("kept", [1.0, 0.8, 0.2], ids=["full grid", "gaps", "sparse"])
def test_sums_factor_by_factor_are_those_of_the_rows_weights(kept):
    """A row counts as often as the product of how often its levels were drawn, whichever way that is summed."""
    generator = np.random.default_rng(3)
    grid = [place for place in itertools.product("abcd", "vwxyz", "01") if generator.random() < kept]
    values = generator.normal(size=len(grid))
    columns = dict(zip(("concept", "prompt", "seed"), zip(*grid, strict=True), strict=True))
    means = [w @ values / w.sum() for part in weights(factors(columns), 700, 5) for w in part if w.sum()]
    found = bootstrap_mean(values, columns, resamples=700, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
