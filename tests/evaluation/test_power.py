"""Variance components and the smallest difference shown, against closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers import ROOT, refused, run_here, run_main
from scipy import stats

from dci.evaluation.power import Variances, concepts_needed, difference_variances, smallest_shown, variance_components
from dci.evaluation.scores import ImageScore, RunScores, Scores, read_report, read_reports, summarize
from ldm.errors import UserError

EFFECTS = [
    ("concept", "prompt", "seed"),
    ("concept", "prompt"),
    ("concept", "seed"),
    ("prompt", "seed"),
    ("concept",),
    ("prompt",),
    ("seed",),
]


def drawn(deviations, shape, seed=0):
    """A table that is the sum of independent normal effects."""
    generator, table = np.random.default_rng(seed), np.zeros(shape)
    for effect, deviation in deviations.items():
        own = [n if axis in effect else 1 for axis, n in zip(("concept", "prompt", "seed"), shape, strict=True)]
        table = table + deviation * generator.standard_normal(own)
    return table


def test_components_are_unbiased():
    """The mean estimate over many tables is the true variance, within what so many tables leave open."""
    true = dict(zip(EFFECTS, (1.0, 0.8, 0.5, 0.0, 1.5, 0.3, 0.6), strict=True))
    found = [variance_components(drawn(true, (12, 10, 9), seed)) for seed in range(300)]
    for effect, deviation in true.items():
        values = np.array([one[effect] for one in found])
        error = values.std() / len(values) ** 0.5
        # An estimate below zero counts as zero, which moves only the effect that is none.
        assert abs(values.mean() - deviation**2) < (4 * error if deviation else 0.05), effect


def test_two_crossed_factors_are_those_of_the_textbook():
    """Without repeats: residual mean square, and (MS_rows - MS_residual) / columns; computed from sums."""
    table = drawn({("concept",): 1.0, ("prompt",): 0.5, ("concept", "prompt"): 0.7}, (6, 5, 1))
    values = table[:, :, 0]
    rows, columns, grand = values.mean(1), values.mean(0), values.mean()
    residual = ((values - rows[:, None] - columns[None] + grand) ** 2).sum() / (5 * 4)
    between = 5 * ((rows - grand) ** 2).sum() / 5
    found = variance_components(table)
    assert found["concept", "prompt"] == pytest.approx(residual)
    assert found["concept",] == pytest.approx((between - residual) / 5)
    assert ("seed",) not in found


def test_the_variance_of_a_mean_is_the_sum_over_effects():
    variances = Variances("m", {"concept": 4, "prompt": 5, "seed": 2}, {("concept",): 8.0, ("concept", "prompt"): 10.0})
    assert variances.of_mean() == pytest.approx(8 / 4 + 10 / 20)
    assert variances.of_mean({"concept": 8}) == pytest.approx(8 / 8 + 10 / 40)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.5, 0.8])
def test_with_concepts_alone_the_difference_shown_is_that_of_the_normal_test(power):
    """(z_0.975 + z_power) sigma / sqrt(n), where n is large; the percentile interval's own deviation divides by n."""
    n, deviation = 100, 0.3
    variances = Variances("m", {"concept": 8, "prompt": 1, "seed": 1}, {("concept",): deviation**2})
    shown = smallest_shown(variances, n, power=power, repetitions=1500, resamples=400)
    expected = (stats.norm.ppf(0.975) + stats.norm.ppf(power)) * deviation / n**0.5
    assert shown.difference == pytest.approx(expected, rel=0.06)
    assert shown.half_length == pytest.approx(stats.norm.ppf(0.975) * deviation * ((n - 1) / n) ** 0.5 / n**0.5, rel=0.03)


def test_the_number_of_concepts_needed_agrees_with_what_they_show():
    variances = Variances("m", {"concept": 8, "prompt": 2, "seed": 1}, {("concept",): 0.09, ("concept", "prompt"): 0.01})
    design = {"repetitions": 60, "resamples": 200}
    needed = concepts_needed(variances, 0.2, **design)
    assert smallest_shown(variances, needed, **design).difference <= 0.2
    assert smallest_shown(variances, needed - 1, **design).difference > 0.2
    assert concepts_needed(variances, 0.001, most=8, **design) is None


def scores(table, gap=None):
    rows = tuple(
        ImageScore(f"{c}-{p}-{s}.png", f"prompt {p}", "", f"0:{s}", {"dino_i": float(table[c, p, s])}, f"concept {c}")
        for c, p, s in itertools.product(*map(range, table.shape))
        if (c, p, s) != gap
    )
    return Scores(rows, summarize(rows, 9))


def test_variances_are_of_the_paired_differences():
    shared, own = drawn({("concept",): 5.0}, (6, 4, 3)), drawn({("concept", "prompt"): 0.5}, (6, 4, 3), 1)
    (found,) = difference_variances(scores(shared + own), scores(shared))
    assert found.levels == {"concept": 6, "prompt": 4, "seed": 3}
    assert found.components["concept", "prompt"] == pytest.approx(0.25, rel=0.7)
    assert found.components["concept",] < 0.2  # what both share is paired away
    with pytest.raises(UserError, match="complete"):
        difference_variances(scores(shared), scores(own, gap=(0, 0, 0)))


@pytest.mark.parametrize(
    ("design", "message"), [({"concepts": 1}, "2 or more"), ({"concepts": 4, "power": 1.0}, "power 1.0: expected")]
)
def test_designs_that_show_nothing(design, message):
    with pytest.raises(UserError, match=message):
        smallest_shown(Variances("m", dict.fromkeys(("concept", "prompt", "seed"), 2), {}), **design)


def of_others(scores):
    """The same values under other concepts' names."""
    rows = tuple(dataclasses.replace(row, concept=f"{row.concept} again") for row in scores.rows)
    return dataclasses.replace(scores, rows=rows)


@pytest.mark.slow
def test_the_program(tmp_path, capfd):
    from dci.evaluation.report import write_report

    image = ROOT / "data/concepts/cat/00.png"
    table = drawn({("concept",): 0.1}, (4, 3, 2))
    runs = [
        RunScores(name, scores(table + shift))
        for name, shift in (("plain", 0), ("dci", drawn({("concept",): 0.2}, (4, 3, 2), 5)))
    ]
    for run in runs:
        for row in run.scores.rows:
            object.__setattr__(row, "file", str(image))
            row.values["clip_t"] = row.values["dino_i"]
    write_report(tmp_path, runs, "Runs")
    assert [run.name for run in read_report(tmp_path)] == ["plain", "dci"]
    given = (tmp_path, "--concepts", "4,16", "--repetitions", 20, "--resamples", 99)
    run_main("power.py", *given)
    out = capfd.readouterr().out
    assert "dci less plain" in out
    table = [line.split("|") for line in out.splitlines() if line.strip().startswith(("| 4 ", "| 16 "))]
    four, sixteen = (float(cells[2]) for cells in table[:2])
    assert four > sixteen > 0
    refused(run_here(capfd, "power.py", *given, tmp_path / "scores.json"), "has a row 'plain' of '", "give one of them")
    write_report(tmp_path / "more", [RunScores(run.name, of_others(run.scores)) for run in runs], "More")
    run_main("power.py", *given, tmp_path / "more")
    pooled = read_reports([tmp_path, tmp_path / "more"])
    variances = difference_variances(pooled["dci"], pooled["plain"])
    assert variances[0].levels == {"concept": 8, "prompt": 3, "seed": 2}
    assert f"{variances[0].components['concept',] ** 0.5:.3f}" in capfd.readouterr().out
    run_main("power.py", *given, "--difference", "0.001", "--metrics", "dino_i")
    assert "more than 128" in capfd.readouterr().out
    refused(run_here(capfd, "power.py", *given, "--run", "ico"), "no row 'ico'", "plain; dci")
    refused(run_here(capfd, "power.py", *given, "--against", "dci"), "both 'dci'")
    refused(run_here(capfd, "power.py", tmp_path / "none"), f"no file {tmp_path / 'none'}", "scores.json")
