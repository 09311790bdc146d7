"""Suites: from a configuration or a data set's folder to cells, an estimate, and a report."""

import copy
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, as_a_program, refused, run_here, run_main
from test_datasets import concepts, dreambench, dreambench_plus  # noqa: F401

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.evaluation.scores import ImageScore, RunScores, Scores, summarize
from dci.experiments import cell, runner
from dci.experiments import cost as costs
from dci.experiments.comparison import verdict
from dci.experiments.cost import cost, describe, estimate, images_of
from dci.experiments.grid import grid_folder, grid_points
from dci.experiments.suite import load_suite
from dci.files import read_prompts
from dci.finetuning.config import concepts_of
from dci.finetuning.config_files import finetune_config
from ldm import config as configuration
from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.pretraining.artwork import COLOURS, NOUNS
from ldm.pretraining.concepts import NOTO_CONCEPTS, STUDY_CONCEPTS
from ldm.pretraining.scenes import PLACES

SUITES = ROOT / "configs/eval"


METHODS = {"custom-diffusion", "textual-inversion", "lora", "ico", "ico-no-suffix", "ico-shared-context"}


@pytest.mark.slow
def test_the_tiny_suite_is_what_it_says(tmp_path):
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}"])
    plan = grid_points(suite)
    held_out = STUDY_CONCEPTS | NOTO_CONCEPTS
    assert {concept.name for concept in suite.concepts} == held_out.keys()
    assert all(concept.concepts[0].class_noun == held_out[concept.name].noun for concept in suite.concepts)
    regularized = {"custom-diffusion-regularized", "ico-regularized"}
    assert {(point.method, point.setting) for point in plan} == {
        (method, setting) for method in METHODS | regularized for setting in ("plain", "dci")
    }
    assert suite.n_samples == 8
    trained = {point.method: point.training.config for point in plan}
    references = {name: t.training.batch_size // (2 if name in regularized else 1) for name, t in trained.items()}
    assert set(references.values()) == {8}  # images of the concept in a step
    assert {name for name, options in trained.items() if options.data.regularization} == regularized
    assert trained["lora"].training.lora_rank


@pytest.mark.slow
def test_the_suite_of_equal_trainings_differs_from_the_tiny_suite_in_steps_alone(tmp_path):
    equal, tiny = (load_suite(SUITES / name, [f"outdir={tmp_path}"]) for name in ("tiny-equal.yaml", "tiny.yaml"))
    assert equal.concepts == tiny.concepts and (equal.sampling, equal.n_samples) == (tiny.sampling, tiny.n_samples)
    trainings = {point.method: point.training.config for point in grid_points(tiny)}
    for point in grid_points(equal):
        method, _, steps = point.method.partition("-steps=")
        expected = copy.deepcopy(trainings[method])
        expected.training.steps = int(steps)
        expected.concepts = point.training.config.concepts
        assert point.training.config == expected


def test_the_tiny_suite_asks_for_more_than_a_place():
    prompts = read_prompts(ROOT / "data/prompts/tiny.txt")
    assert len(set(prompts)) == len(prompts) == 20 and all(prompt.count("{}") == 1 for prompt in prompts)
    phrases = [phrase for _, phrases in PLACES.values() for phrase in phrases]
    words = {word for prompt in prompts for word in prompt.replace("{}", "").split()}
    assert all(any(phrase in prompt for phrase in phrases) for prompt in prompts)
    seconds = [prompt for prompt in prompts if re.search(r"\{\} (and|next to) ", prompt)]
    assert len(seconds) >= 6 and all(any(noun in prompt for noun in NOUNS) for prompt in seconds)
    assert read_prompts(ROOT / "data/prompts/pairs.txt") == seconds
    assert len(words & COLOURS.keys()) >= 5 and words >= {"small", "big", "close"}
    # Each is understood as it stands, and names the concept once in both branches' prompts.
    for prompt in prompts:
        parsed = parse_prompt(prompt, ConceptName(("<new1>",), "boat"))
        assert "<new1> boat" in parsed.concept and "boat" in parsed.auxiliary


@pytest.mark.slow
def test_a_tenth_of_the_tiny_suite(tmp_path):
    (line,) = re.findall(
        r"compare\.py --config configs/eval/tiny.yaml (name=tiny-tenth .+)", (SUITES / "tiny.yaml").read_text()
    )
    tenth = grid_points(load_suite(SUITES / "tiny.yaml", [*line.split(), f"outdir={tmp_path}"]))
    whole = grid_points(load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}"]))
    assert 0.08 < sum(map(images_of, tenth)) / sum(map(images_of, whole)) < 0.12
    assert {point.method for point in tenth} == {point.method for point in whole}
    assert len({point.concept for point in tenth}) >= 10 and {point.seed for point in tenth} == {1}
    assert len(read_prompts(tenth[0].task.prompts)) == 10
    named = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}", "dataset.subjects=[teddy,boot]"])
    assert [concept.name for concept in named.concepts] == ["boot", "teddy"]
    with pytest.raises(UserError, match="no 'tedy' in the suite's list"):
        load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}", "dataset.subjects=[tedy]"])


def test_dreambench_becomes_cells(dreambench, tmp_path):  # noqa: F811
    suite = load_suite(SUITES / "dreambench.yaml", [f"dataset.folder={dreambench}", f"outdir={tmp_path}"])
    plan = grid_points(suite)
    assert {(point.concept, point.method, point.setting) for point in plan} == {
        (subject, method, setting)
        for subject in ("dog6", "grey_sloth_plushie")
        for method in METHODS
        for setting in ("plain", "dci")
    }
    sloth = next(point for point in plan if point.concept == "grey_sloth_plushie" and point.method == "ico")
    (concept,) = learned(sloth)
    assert concept == {"class_noun": "stuffed animal", "images": str(dreambench / "grey_sloth_plushie")}
    with open(sloth.task.prompts) as file:
        assert file.read() == "a {} in the jungle\na {} on a cook's table\n"
    assert sloth.task.sampling.n_samples == 4
    assert sloth.task.references == (str(dreambench / "grey_sloth_plushie"),)
    assert sloth.task.evaluation.clip == "open_clip:ViT-B-32/openai"
    one = load_suite(SUITES / "dreambench.yaml", [f"dataset.folder={dreambench}", f"outdir={tmp_path}", "dataset.first=1"])
    assert [concept.name for concept in one.concepts] == ["dog6"]


def test_dreambenchs_ablations_change_what_tinys_do(dreambench, tmp_path):  # noqa: F811
    given = [f"dataset.folder={dreambench}", f"outdir={tmp_path}"]
    plan = grid_points(load_suite(SUITES / "dreambench-ablations.yaml", given))
    tiny = grid_points(load_suite(SUITES / "tiny-ablations.yaml", [f"outdir={tmp_path}"]))

    def changed(points):
        """What each setting changes from the one around which they are changed, without the values."""
        tasks = {point.setting: dataclasses.asdict(point.task.sampling) for point in points if point.method == "ico"}
        around = tasks["dci"]
        return {
            frozenset(name for name, value in task.items() if value != around[name]) - {"clip"} for task in tasks.values()
        }

    assert changed(plan) == changed(tiny)
    assert len({point.training.name for point in plan}) == len({point.concept for point in plan}) == 2


def learned(point):
    """The concepts that a point's training is told."""
    (given,) = [part for part in point.training.task.options if part.startswith("concepts=")]
    return json.loads(given.removeprefix("concepts="))


def test_pairs_are_learned_together(concepts, tmp_path):  # noqa: F811
    suite = load_suite(SUITES / "customconcept101-pairs.yaml", [f"dataset.folder={concepts}", f"outdir={tmp_path}"])
    point = grid_points(suite)[0]
    parts = learned(point)
    assert [part["class_noun"] for part in parts] == ["dog", "dice plushie"]
    assert parts[0]["regularization"] == str(concepts / "regularization/pet_dog1")
    assert point.task.references == tuple(part["images"] for part in parts)
    assert point.task.evaluation.scaled_text_score is True
    # The training reads it as it stands: two concepts, which the file's short form does not get in the way of.
    config = finetune_config(point.training.task.config, point.training.task.options)
    assert [entry.class_noun for entry in concepts_of(config)] == ["dog", "dice plushie"]
    assert [entry.regularization for entry in concepts_of(config)] == [str(concepts / "regularization/pet_dog1"), "generate"]
    assert config.validation.prompts == ["a photo of a V1*", "a photo of a V2*"] or not config.validation.every


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
        (["dataset.folder=FOLDER", "cluster=moon"], "cluster=moon"),
    ],
)
def test_suites_that_cannot_be_used(dreambench, tmp_path, overrides, message):  # noqa: F811
    given = [part.replace("FOLDER", str(dreambench)).replace("NOWHERE", str(tmp_path)) for part in overrides]
    with pytest.raises(UserError, match=message):
        load_suite(SUITES / "dreambench.yaml", [*given, f"outdir={tmp_path}"])


def test_an_image_of_dreambench_plus_has_a_folder_of_its_own(dreambench_plus, tmp_path):  # noqa: F811
    given = [f"dataset.folder={dreambench_plus}", f"outdir={tmp_path}", "dataset.first=2"]
    suite = load_suite(SUITES / "dreambench-plus.yaml", given)
    assert [concept.name for concept in suite.concepts] == ["live_subject_animal_00_kitten", "object_07_alarm_clock"]
    for concept in suite.concepts:
        (folder,) = concept.folders
        assert [file.read_bytes() for file in Path(folder).iterdir()] == [b"an image"]
    assert suite.concepts[0].folders != suite.concepts[1].folders
    assert len(read_prompts(suite.concepts[0].prompts)) == 9


@pytest.fixture
def published(dreambench, dreambench_plus, concepts):  # noqa: F811
    """The folder of each data set, of the layout in which it is published."""
    return {
        "dreambench": dreambench,
        "dreambench-plus": dreambench_plus,
        "customconcept101": concepts,
        "customconcept101-pairs": concepts,
    }


OFFICIAL, SUITE_FILES = ROOT / "tests/data/official", sorted((ROOT / "configs").glob("[es][vw]*/*.yaml"))
PLANNED = [(file, model) for file in SUITE_FILES for model in (None, "v1-inference.yaml")]
PLANNED.append((SUITES / "dreambench.yaml", "sd_xl_base.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "model"),
    PLANNED,
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_shipped_suite_is_planned(published, tmp_path, capfd, monkeypatch, file, model):
    monkeypatch.setattr(costs, "cost", lambda config: costs.Cost(config.unet.model_channels, 1))  # is tested below
    monkeypatch.setattr(costs, "matrix_rate", lambda *_, **__: 1e9)
    suite = yaml.safe_load(file.read_text())
    given = [f"outdir={tmp_path / 'out'}", "training=[validation.every=0]"]
    if "dataset" in suite:
        given.append(f"dataset.folder={published[suite['dataset']['kind']]}")
    if model:
        given[1] = f"training=[validation.every=0,model={OFFICIAL / model},checkpoint=WEIGHTS]"
        given.append("sampling.clip=open_clip:ViT-B-32/openai")  # chooses auxiliary nouns; the tiny model has its own
    run_main("sweep.py", "--config", file, *given, "--dry-run")
    out = capfd.readouterr().out
    assert "cells are done" in out and "Estimate:" in out
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_cost_is_the_published_one_of_stable_diffusion():
    """803.3 and 2,514.5 GFLOP are what others count for a UNet row and a decode at 512 px."""
    found = cost(configuration.load(ModelConfig, ROOT / "configs/model/sd-v1.yaml"))
    assert found.unet == pytest.approx(803.3e9, rel=1e-3)
    assert found.decode == pytest.approx(2514.5e9, rel=1e-3)


@pytest.mark.slow
def test_an_estimate_counts_what_is_left(tmp_path):
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}", "n_samples=2"])
    plan = grid_points(suite)
    trainings = len({point.training.name for point in plan})
    whole = estimate(plan, "cpu", rate=1e9)
    assert (whole.trainings, whole.images) == (trainings, len(plan) * 40)
    price = cost(configuration.load(ModelConfig, ROOT / "configs/model/tiny.yaml"))
    times = [method.sampling["dci"]["agg_time"] for method in suite.methods]
    rows = len(suite.concepts) * 40 * 10 * sum(4 + t for t in times)  # 10 steps, plain and with DCI: one row more up to T_a
    made = 48 * len({concept.noun for concept in STUDY_CONCEPTS.values()})  # for regularization, of 10 steps, once
    assert whole.class_images == made
    flops = (rows + made * 20) * price.unet + (len(plan) * 40 + made) * price.decode
    assert whole.sampling_hours == pytest.approx(flops / (0.5 * 1e9 * 3600))
    given = [dict(option.split("=") for option in method.training) for method in suite.methods]
    seen = sum(int(one["training.steps"]) * int(one.get("training.batch_size", 8)) for one in given) * len(suite.concepts)
    assert whole.training_hours == pytest.approx(2.1 * seen * price.unet / (0.5 * 1e9 * 3600))
    first = plan[0]
    for file in (first.result, first.training.concept_file):
        file.parent.mkdir(parents=True)
        file.touch()
    rest = estimate(plan, "cpu", rate=1e9)
    assert (rest.trainings, rest.images) == (trainings - 1, whole.images - 40)
    assert f"{whole.images - 40:,} images" in describe(rest, "cpu", 1e9, 2)


def scores(values):
    rows = tuple(
        ImageScore(f"{p}-{s}.png", f"prompt {p}", "", f"0:{s}", {"clip_t": clip, "dino_i": dino}, "dog")
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


class Fork:
    """A stage in a fork of this process, which spares the imports; as much of a Popen as a worker needs."""

    def __init__(self, command, stdout, env, **_):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ |= env
            os._exit(as_a_program(lambda: cell.main(list(command[-2:])), ROOT, stdout.fileno(), stdout.fileno()))

    def wait(self):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


@pytest.fixture
def scoring_forked(monkeypatch):
    """Training is a process as the worker starts it; scoring, of which there is more, begins with this one's imports."""
    if sys.platform == "linux":
        popen, context = runner.subprocess.Popen, multiprocessing.get_context
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: context("fork"))  # of workers, which see the other
        start = lambda command, **options: (Fork if "score" in command else popen)(command, **options)  # noqa: E731
        monkeypatch.setattr(runner.subprocess, "Popen", start)


@pytest.mark.slow
def test_a_suite_from_training_to_report(dreambench, scoring_forked, tmp_path, capfd):  # noqa: F811
    """From the published folder; repeated, nothing is done again."""
    from PIL import Image

    for name in ("dog6", "grey_sloth_plushie"):
        for index, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (80, 64), colour).save(dreambench / name / f"{index:02}.jpg")
    method = f"{{name: ico, config: {ROOT / 'configs/train/ico-tiny.yaml'}}}"
    given = (
        "--config",
        SUITES / "dreambench-tiny.yaml",
        f"dataset.folder={dreambench}",
        f"outdir={tmp_path}",
        "n_samples=1",
        "training=[training.steps=1,training.batch_size=2,validation.every=0,logging.tensorboard=false]",
        "sampling={steps: 1}",
        "dataset.first=1",
        "dataset.prompts=1",
        "workers=1",
        f"methods=[{method}]",
    )
    run_main("compare.py", *given, "--dry-run")
    assert "1 trainings and 2 images" in capfd.readouterr().out
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
    assert "0 trainings and 0 images" in capfd.readouterr().out
    refused(run_here(capfd, "compare.py", *given, "n_samples=2"), "other options")


def test_the_folder_is_named_after_the_suite(tmp_path):
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}", "name=other"])
    assert grid_folder(suite) == tmp_path / "other"
