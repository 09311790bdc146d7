"""Suites: from a configuration or a data set's folder to cells, an estimate, and a report."""

import json

import pytest
import torch
from conftest import ROOT
from test_benchmarks import concepts, dreambench  # noqa: F401
from test_scripts import refused, run_here, run_main

from dci.comparison import verdict
from dci.estimate import cost, describe, estimate
from dci.grid import cells, grid_folder
from dci.scores import PictureScore, RunScores, Scores, summarize
from dci.suites import load_suite
from ldm import config as configuration
from ldm.config import ModelConfig
from ldm.errors import UserError

SUITES = ROOT / "configs/eval"


def option(command, name):
    return command[command.index(name) + 1]


def test_the_tiny_suite_is_what_it_says(tmp_path):
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}"])
    plan = cells(suite)
    assert len(suite.concepts) >= 8
    assert {(cell.method, cell.setting) for cell in plan} == {
        (method, setting) for method in ("custom-diffusion", "ico") for setting in ("plain", "dci")
    }
    prompts = (ROOT / "data/prompts/tiny.txt").read_text().split("\n")
    assert len([line for line in prompts if line]) == 20
    assert suite.n_samples == 8
    choice = load_suite(SUITES / "tiny-choice.yaml", [f"outdir={tmp_path}"])
    assert not {c.name for c in suite.concepts} & {c.name for c in choice.concepts}


def test_dreambench_becomes_cells(dreambench, tmp_path):  # noqa: F811
    suite = load_suite(SUITES / "dreambench.yaml", [f"dataset.folder={dreambench}", f"outdir={tmp_path}"])
    plan = cells(suite)
    assert len(plan) == 2 * 2 * 2
    sloth = next(cell for cell in plan if cell.concept == "grey_sloth_plushie" and cell.method == "ico")
    assert "concept.class_noun=stuffed animal" in sloth.training.command
    assert f"data.images={dreambench / 'grey_sloth_plushie'}" in sloth.training.command
    prompts = option(sloth.sampling, "--from-file")
    with open(prompts) as file:
        assert file.read() == "a {} in the jungle\na {} on a cook's table\n"
    assert option(sloth.sampling, "--n-samples") == "4"
    assert option(sloth.evaluation, "--references") == str(dreambench / "grey_sloth_plushie")
    one = load_suite(SUITES / "dreambench.yaml", [f"dataset.folder={dreambench}", f"outdir={tmp_path}", "dataset.first=1"])
    assert [concept.name for concept in one.concepts] == ["dog6"]


def test_pairs_are_learned_together(concepts, tmp_path):  # noqa: F811
    suite = load_suite(SUITES / "customconcept101-pairs.yaml", [f"dataset.folder={concepts}", f"outdir={tmp_path}"])
    cell = cells(suite)[0]
    (given,) = [part for part in cell.training.command if part.startswith("concepts=")]
    parts = json.loads(given.removeprefix("concepts="))
    assert [part["class_noun"] for part in parts] == ["dog", "dice plushie"]
    assert parts[0]["regularization"] == str(concepts / "regularization/pet_dog1")
    start = cell.evaluation.index("--references") + 1
    assert cell.evaluation[start : start + 2] == tuple(part["images"] for part in parts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.kind=dreamboth"], "expected one of dreambench"),
        ([], r"add dataset\.folder"),
        (["dataset.folder=NOWHERE"], "prompts_and_classes.txt"),
        (["dataset.folder=FOLDER", "dataset.subjects=[dgo6]"], "no 'dgo6'"),
        (["dataset.folder=FOLDER", "dataset.first=0"], r"dataset\.first=0"),
        (["dataset.folder=FOLDER", "workers=0"], "workers=0"),
        (["dataset.folder=FOLDER", "methods=[]"], "methods is empty"),
    ],
)
def test_suites_that_cannot_be_used(dreambench, tmp_path, overrides, message):  # noqa: F811
    given = [part.replace("FOLDER", str(dreambench)).replace("NOWHERE", str(tmp_path)) for part in overrides]
    with pytest.raises(UserError, match=message):
        load_suite(SUITES / "dreambench.yaml", [*given, f"outdir={tmp_path}"])


def test_cost_is_the_published_one_of_stable_diffusion():
    """803.3 and 2,514.5 GFLOP are what others count for a UNet row and a decode at 512 px."""
    found = cost(configuration.load(ModelConfig, ROOT / "configs/model/sd-v1.yaml"))
    assert found.unet == pytest.approx(803.3e9, rel=1e-3)
    assert found.decode == pytest.approx(2514.5e9, rel=1e-3)


def test_an_estimate_counts_what_is_left(tmp_path):
    overrides = [f"outdir={tmp_path}", "n_samples=2", "training=[training.steps=10]"]
    suite = load_suite(SUITES / "tiny.yaml", overrides)
    plan = cells(suite)
    whole = estimate(plan, "cpu", rate=1e9)
    assert (whole.trainings, whole.pictures) == (16, len(plan) * 40)
    price = cost(configuration.load(ModelConfig, ROOT / "configs/model/tiny.yaml"))
    rows = 16 * 40 * 20 * (2 + 2.5)  # 20 steps; with DCI, whose T_a is 0.5 there, half a row more
    assert whole.sampling_hours == pytest.approx((rows * price.unet + 32 * 40 * price.decode) / (0.5 * 1e9 * 3600))
    first = plan[0]
    for file in (first.result, first.training.concept_file):
        file.parent.mkdir(parents=True)
        file.touch()
    rest = estimate(plan, "cpu", rate=1e9)
    assert (rest.trainings, rest.pictures) == (15, whole.pictures - 40)
    assert "1,240 pictures" in describe(rest, "cpu", 1e9, 2)


def scores(values):
    rows = tuple(
        PictureScore(f"{p}-{s}.png", f"prompt {p}", "", f"0:{s}", {"clip_t": clip, "dino_i": dino}, "dog")
        for p in range(8)
        for s in range(4)
        for clip, dino in [values(p, s)]
    )
    return Scores(rows, summarize(rows, 500))


def test_a_verdict_follows_the_paired_differences():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, generator=generator).tolist()
    plain = RunScores("plain", scores(lambda p, s: (noise[p][s], 0.5 + 0.01 * noise[s][0])))
    better = RunScores("dci", scores(lambda p, s: (noise[p][s] + 0.1 + 0.01 * noise[s][1], 0.5 + 0.01 * noise[p][3])))
    assert "better in editability;" in verdict(better, plain)
    assert "worse in editability;" in verdict(plain, better)
    assert "no difference shown" in verdict(plain, plain)


def test_a_suite_from_training_to_report(dreambench, tmp_path, capfd):  # noqa: F811
    """From the published folder; repeated, nothing is done again."""
    from PIL import Image

    for name in ("dog6", "grey_sloth_plushie"):
        for index, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (80, 64), colour).save(dreambench / name / f"{index:02}.jpg")
    method = f"{{name: ico, config: {ROOT / 'configs/train/ico-tiny.yaml'}}}"
    given = ("--config", SUITES / "dreambench-tiny.yaml", f"dataset.folder={dreambench}", f"outdir={tmp_path}",
             "n_samples=1", "training=[training.steps=1,training.batch_size=2,validation.every=0,logging.tensorboard=false]",
             "sampling={steps: 1}", "dataset.first=1", "dataset.prompts=1", f"methods=[{method}]")  # fmt: skip
    run_main("compare.py", *given, "--dry-run")
    assert "1 trainings and 2 pictures" in capfd.readouterr().out
    run_main("compare.py", *given)
    folder = tmp_path / "dreambench-tiny"
    page = (folder / "report/report.html").read_text()
    assert "ico, dci against ico, plain" in page
    assert (folder / "report/sheet-dog6.webp").is_file()
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png") if "report" not in file.parts}
    assert len([file for file in files if file.parent.name == "samples"]) == 2
    run_main("compare.py", *given)
    assert files == {file: file.stat().st_mtime_ns for file in files}
    capfd.readouterr()
    run_main("compare.py", *given, "--dry-run")
    assert "0 trainings and 0 pictures" in capfd.readouterr().out
    refused(run_here(capfd, "compare.py", *given, "n_samples=2"), "other options")


def test_the_folder_is_named_after_the_suite(tmp_path):
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}", "name=other"])
    assert grid_folder(suite) == tmp_path / "other"
