"""What decides a gain: effects of factors against differences by hand, correlation against SciPy, the study's concepts."""

import json
import os

import numpy as np
import pytest
import yaml
from helpers import ROOT, refused, run_here, run_main
from scipy import stats

from dci.evaluation.report import write_report
from dci.evaluation.scores import ImageScore, RunScores, Scores, read_report, summarize
from dci.experiments.gain_study import effects, gains, rank_correlation, runs_by_variant
from dci.experiments.grid import grid_points
from dci.experiments.suite import load_suite
from ldm.errors import UserError
from ldm.pretraining.artwork import HELD_OUT
from ldm.pretraining.study import DRAWINGS, VARIANTS

ARTWORK = os.environ.get("DCI_ARTWORK", str(ROOT / ".artwork"))


def made(values):
    """Gains of noun-variant concepts over two prompts and two noises."""
    return {
        name: {(p, n): gain + 0.01 * i + 0.02 * j for i, p in enumerate("ab") for j, n in enumerate(("0:0", "0:1"))}
        for name, gain in values.items()
    }


def test_an_effect_is_the_gain_less_that_of_the_usual_variant():
    found = made({"dog-usual": 0.1, "dog-seen": 0.4, "cake-usual": 0.2, "cake-seen": 0.3, "cat-small": 0.0})
    found = {name: found[name] for name in found if name != "cat-small"}
    usual, seen = effects(found)
    assert (usual.variant, usual.effect, seen.variant) == ("usual", None, "seen")
    assert usual.gain.mean == pytest.approx(0.15 + 0.005 + 0.01)
    assert seen.effect.mean == pytest.approx(((0.4 - 0.1) + (0.3 - 0.2)) / 2)
    assert (seen.effect.low, seen.effect.high) == pytest.approx((0.1, 0.3))  # of two nouns the interval spans both
    with pytest.raises(UserError, match="NOUN-usual"):
        effects(made({"dog-seen": 0.1}))


def test_rank_correlation_is_scipys():
    generator = np.random.default_rng(0)
    traits = {str(i): float(v) for i, v in enumerate(generator.integers(0, 6, 12))}  # with ties
    found = {name: {("p", "0:0"): float(generator.normal())} for name in traits}
    expected = stats.spearmanr(list(traits.values()), [v["p", "0:0"] for v in found.values()]).statistic
    interval = rank_correlation(traits, found, resamples=400)
    assert interval.mean == pytest.approx(expected) and interval.low < expected < interval.high and interval.n == 12
    rising = {name: {("p", "0:0"): value**3} for name, value in traits.items()}
    assert rank_correlation(traits, rising, resamples=50).mean == pytest.approx(1)
    with pytest.raises(UserError, match="4 or more"):
        rank_correlation({"0": 1.0}, found)


@pytest.fixture
def suite(tmp_path):
    """A suite of four variants whose results are written by hand: ICO gains 0.1 in all, 0.3 more in the seen drawing."""
    concepts = [
        {"name": f"{noun}-{variant}", "class_noun": noun, "images": str(ROOT / "data/concepts/cat")}
        for noun in ("dog", "cake")
        for variant in ("usual", "seen")
    ]
    vary = {"training.steps": [100, 400]}
    methods = [
        {"name": name, "config": str(ROOT / f"configs/train/{name}-tiny.yaml"), "vary": vary}
        for name in ("custom-diffusion", "ico")
    ]
    content = {
        "name": "s",
        "concepts": concepts,
        "methods": methods,
        "outdir": str(tmp_path / "out"),
        "prompts": str(ROOT / "configs/sweep/tiny-prompts.txt"),
        "settings": [{"name": "plain"}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    points = grid_points(load_suite(tmp_path / "suite.yaml"))
    for point in points:
        score = 0.5 + (0.1 + 0.3 * point.concept.endswith("seen")) * point.method.startswith("ico")
        rows = [{"file": "f", "prompt": p, "text": p, "noise": "0:0", "values": {"dino_i": score}} for p in "ab"]
        point.folder.mkdir(parents=True)
        point.result.write_text(json.dumps({"rows": rows, "summary": {}, "metadata": {}}))
    return tmp_path / "suite.yaml", points


def test_gains_are_the_paired_differences_of_two_methods(suite):
    file, points = suite
    found = gains(points, "ico-steps=100", "custom-diffusion-steps=100", "plain")
    assert found["dog-seen"] == {("a", "0:0"): pytest.approx(0.4), ("b", "0:0"): pytest.approx(0.4)}
    with pytest.raises(UserError, match="no result of dog-usual/ico "):
        gains(points, "ico", "custom-diffusion-steps=100", "plain")


def test_concepts_with_a_dash_in_their_names_are_no_variants_of_a_noun(suite):
    _, points = suite
    assert {run.name.partition(", ")[2] for run in runs_by_variant(points, "plain")} == {"usual", "seen"}
    assert not runs_by_variant([point for point in points if not point.concept.endswith("usual")], "plain")


@pytest.mark.slow
def test_the_program_says_what_decides_the_gain(suite, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main("study_gain.py", "--suite", suite[0], "--base-images", 1)
    out = capfd.readouterr().out
    assert "dino_i of ico-steps=400 less custom-diffusion-steps=400, plain" in out
    assert "seen       0.4000 [0.4000, 0.4000]   less usual: 0.3000 [0.3000, 0.3000]" in out
    content = json.loads((tmp_path / "outputs/s/report.json").read_text())
    assert content["ico-steps=100"]["cake-usual"] == pytest.approx(0.1)
    assert len(content["distance"]) == 4 and all(0 < value < 2 for value in content["distance"].values())
    runs = {run.name: run.scores for run in read_report(tmp_path / "outputs/s")}
    assert {row.concept for row in runs["ico-steps=100, seen"].rows} == {"dog", "cake"}
    assert runs["ico-steps=100, seen"].summary["dino_i"].mean == pytest.approx(0.9)
    assert runs["custom-diffusion-steps=400, seen"].summary["dino_i"].mean == pytest.approx(0.5)
    refused(run_here(capfd, "study_gain.py", "--suite", suite[0], "--setting", "dci"), "run the suite to its end first")
    refused(run_here(capfd, "study_gain.py", "--suite", suite[0], "--methods", "ico"), "the method and its baseline")


@pytest.mark.slow
def test_the_program_reads_rows_of_stored_reports(suite, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gain = {"dog-usual": 0.1, "dog-seen": 0.4, "cake-usual": 0.2, "cake-seen": 0.3}

    def row(concept, better):
        values = {"dino_i": 0.5 + better * gain[concept]}
        return ImageScore(str(ROOT / "data/concepts/cat/00.png"), "a", "a", "0:0", values, concept)

    for number, part in enumerate((("dog-usual", "cake-seen"), ("dog-seen", "cake-usual"))):
        rows = {name: tuple(row(concept, name == "ico, x") for concept in part) for name in ("ico, x", "cd")}
        write_report(
            tmp_path / str(number), [RunScores(name, Scores(own, summarize(own))) for name, own in rows.items()], "t"
        )
    stored = (
        "study_gain.py",
        "--suite",
        suite[0],
        "--base-images",
        1,
        "--reports",
        tmp_path / "0",
        tmp_path / "1",
        "--rows",
    )
    run_main(*stored, "ico, x", "cd")
    assert "dino_i of ico, x less cd:\n" in capfd.readouterr().out
    content = json.loads((tmp_path / "outputs/s/report.json").read_text())
    assert content["ico, x"] == pytest.approx(gain)
    order = [content["distance"][concept] for concept in gain]
    assert content["ico, x, correlation"]["mean"] == pytest.approx(stats.spearmanr(order, list(gain.values())).statistic)
    assert not (tmp_path / "outputs/s/scores.json").exists()
    refused(run_here(capfd, *stored, "ico, x", "lora"), "no row 'lora': expected two of ico, x; cd")
    refused(run_here(capfd, *stored[:-1]), "--reports and --rows go together")


def test_the_factors_are_what_they_say():
    assert VARIANTS[0] == "usual" and all(HELD_OUT[drawing][0] == noun for noun, drawing in DRAWINGS.items())


@pytest.mark.skipif(not os.path.isdir(ARTWORK), reason="the artwork is not here: bash scripts/fetch_artwork.sh")
def test_the_study_is_made_from_the_artwork(tmp_path, capfd):
    file = tmp_path / "study/suite.yaml"
    run_main("study_gain.py", "--make", "--artwork", ARTWORK, "--suite", file)
    assert f"{len(DRAWINGS) * len(VARIANTS)} concepts" in capfd.readouterr().out
    suite = load_suite(file, [f"outdir={tmp_path}", "dataset.first=5"])
    assert [concept.name for concept in suite.concepts] == [f"dog-{variant}" for variant in VARIANTS]
    assert {method.family for method in suite.methods} == {"ico", "custom-diffusion"} and len(suite.methods) == 4


@pytest.mark.skipif(not os.path.isdir(ARTWORK), reason="the artwork is not here: bash scripts/fetch_artwork.sh")
def test_a_smaller_study_has_the_named_nouns_and_steps(tmp_path):
    file = tmp_path / "study/suite.yaml"
    run_main("study_gain.py", "--make", "--nouns", "cake, house", "--steps", 50, "--artwork", ARTWORK, "--suite", file)
    suite, nouns = load_suite(file, [f"outdir={tmp_path}"]), ("cake", "house")
    assert [concept.name for concept in suite.concepts] == [f"{noun}-{name}" for noun in nouns for name in VARIANTS]
    assert [method.name for method in suite.methods] == ["custom-diffusion-steps=50", "ico-steps=50"]


def test_nouns_and_steps_that_the_study_does_not_have(tmp_path, capfd):
    options = ("--make", "--suite", tmp_path / "suite.yaml")
    refused(run_here(capfd, "study_gain.py", *options, "--nouns", "cake,cow"), "'cow' is none of the study's: dog, rabbit")
    for steps in ("0", "100,", "many", "-5"):
        refused(run_here(capfd, "study_gain.py", *options, "--steps", steps), f"--steps {steps}: expected numbers above 0")
    assert not (tmp_path / "suite.yaml").exists()
