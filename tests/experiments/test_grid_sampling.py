"""What a grid's `sampling` takes: every option of sample_dci.py, with its effect, or a line on where it belongs."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from foreign_models import lora_concept
from helpers import ROOT, pixels, run_main
from PIL import Image
from safetensors.torch import save_file

from dci.cli.arguments import Parser, add_sampling_options
from dci.cli.branches import add_dci_options
from dci.cli.loading import add_concept_options
from dci.concept.concept_file import Concept
from dci.concept.foreign.export import export
from dci.evaluation.place import Place
from dci.experiments import cell
from dci.experiments.grid import grid_points
from dci.experiments.sampling import ELSEWHERE, SamplingConfig, known_names
from dci.experiments.suite import load_suite
from dci.experiments.tasks import EvaluationConfig, ScoreTask
from ldm.checkpoint import fingerprint, load_model
from ldm.errors import UserError

TINY, SD_V1 = str(ROOT / "configs/model/tiny.yaml"), ROOT / "configs/model/sd-v1.yaml"


def options_of_the_program():
    parser = Parser()
    add_concept_options(parser)
    add_dci_options(parser)
    add_sampling_options(parser)
    names = {string.removeprefix("--") for action in parser._actions for string in action.option_strings}
    return sorted(names - {"help", "-h"})


@pytest.mark.parametrize("option", options_of_the_program())
def test_every_option_of_the_program_is_taken_or_its_place_is_named(option):
    (name,) = known_names({option: 0})
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert (name in fields) != (name in ELSEWHERE)


@pytest.fixture(scope="module")
def files(tiny_base, finetuned, tmp_path_factory):
    """A concept, and everything that images can be made from besides it."""
    folder = tmp_path_factory.mktemp("files")
    finetuned[1].save(folder / "plain.safetensors")
    dataclasses.replace(finetuned[1], config={"model": TINY}).save(folder / "concept.safetensors")
    torch.manual_seed(3)
    export(lora_concept(tiny_base, parts=("to_v", "conv1")), tiny_base, "lora", folder)
    (folder / "mycat-lora.safetensors").rename(folder / "style.safetensors")
    state = {name: weight.clone() for name, weight in tiny_base.autoencoder.state_dict().items()}
    state["decoder.conv_out.bias"] += 0.2
    save_file(state, folder / "vae.safetensors")
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    colours = np.dstack([ramp[None].repeat(64, 0), ramp[:, None].repeat(64, 1), np.full((64, 64), 90, np.uint8)])
    Image.fromarray(colours).save(folder / "init.png")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    Image.fromarray((np.arange(64) < 40)[None].repeat(64, 0)).save(folder / "mask.png")
    (folder / "prompts.txt").write_text("a V* cat on the beach\n")
    (folder / "others.txt").write_text("a V* cat on the beach\na dog\n")
    return folder


def drawn(files, outdir, **sampling):
    """The image of a grid's point of one prompt, and what is recorded of it."""
    options, place = SamplingConfig(n_samples=1, steps=2, **sampling), Place("cat", "ico", 0, "dci")
    concept, prompts = str(files / "concept.safetensors"), str(files / "prompts.txt")
    cell.sample(ScoreTask(place, concept, prompts, options, (), EvaluationConfig(), str(outdir), "cpu"))
    return pixels(outdir / "samples/00000.png"), json.loads((outdir / "prompts.json").read_text())["00000"]


@pytest.mark.slow
def test_a_point_is_sampled_as_the_program_does(files, tmp_path):
    """Further options at once; the program says what each comes to."""
    lora, vae = f"{files / 'style.safetensors'}:0.7", str(files / "vae.safetensors")
    init, mask = str(files / "init.png"), str(files / "mask.png")
    run_main(
        *("sample_dci.py", "--concept", files / "concept.safetensors", "--from-file", files / "prompts.txt"),
        *("--n-samples", 1, "--steps", 2, "--device", "cpu", "--outdir", tmp_path / "program", "--lora", lora, "--vae", vae),
        *("--strength-concept", 0.5, "--init-image", init, "--mask", mask, "--strength", 0.8, "--negative-prompt", "a car"),
        *("--auxiliary-noun", "auto", "--auxiliary-candidates", "car,dog", "--agg-time", 1),
    )
    expected = pixels(tmp_path / "program/samples/00000.png")
    given = {"loras": [lora], "vae": vae, "strength_concept": 0.5, "init_image": init, "mask": mask, "strength": 0.8}
    given |= {"negative_prompt": "a car", "auxiliary_noun": "auto", "auxiliary_candidates": "car,dog", "agg_time": 1}
    found, facts = drawn(files, tmp_path / "all", **given)
    assert np.array_equal(found, expected)
    program = json.loads((tmp_path / "program/prompts.json").read_text())["00000"]
    assert facts.keys() <= program.keys() and {name: program[name] for name in facts if name != "concept"} == {
        name: fact for name, fact in facts.items() if name != "concept"
    }


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    return drawn(files, tmp_path_factory.mktemp("plain"), no_dci=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["loras", "vae", "strength_concept", "init_image"])
def test_each_has_its_effect(files, plain, tmp_path, option):
    value = {
        "loras": [str(files / "style.safetensors")],
        "vae": str(files / "vae.safetensors"),
        "strength_concept": 0.2,
        "init_image": str(files / "init.png"),
    }[option]
    found, _ = drawn(files, tmp_path / "other", no_dci=True, **{option: value})
    assert np.abs(found - plain).max() > 8


def suite(files, tmp_path, *overrides):
    content = yaml.safe_load((ROOT / "configs/sweep/tiny.yaml").read_text())
    content["concepts"], content["methods"] = content["concepts"][:1], content["methods"][:1]
    for entry in (*content["concepts"], *content["methods"]):
        entry |= {key: str(ROOT / entry[key]) for key in ("images", "config") if key in entry}
    content |= {"prompts": "prompts.txt", "outdir": str(tmp_path / "out"), "seeds": [0]}
    (files / "grid.yaml").write_text(yaml.safe_dump(content))
    return grid_points(load_suite(files / "grid.yaml", overrides))


def test_paths_are_seen_from_the_grids_project(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "sampling={init-image: init.png, mask: mask.png, vae: vae.safetensors, lora: 'style.safetensors:0.5', steps: 3}"
    (point,) = suite(files, tmp_path, given)
    sampling = point.task.sampling
    assert [getattr(sampling, name) for name in ("init_image", "mask", "vae")] == [
        str(files / name) for name in ("init.png", "mask.png", "vae.safetensors")
    ]
    assert sampling.loras == [f"{files / 'style.safetensors'}:0.5"]
    # Another content is another recipe.
    before = point.recipe["files"]
    Image.new("RGB", (64, 64), "red").save(files / "init.png")
    (point,) = suite(files, tmp_path, given)
    assert {name for name in before if before[name] != point.recipe["files"][name]} == {str(files / "init.png")}


def test_lists_of_values_and_values_that_are_lists(files, tmp_path):
    options = "{name: a, sampling: {loras: [style.safetensors], original_size: [[64, 64], [64, 32]]}}"
    names = [point.setting for point in suite(files, tmp_path, "settings=[{name: b, sampling: {steps: [1, 2]}}]")]
    assert names == ["b-steps=1", "b-steps=2"]
    with pytest.raises(UserError, match=r"settings: 'a-original_size=\[64, 64\]' names a folder"):
        suite(files, tmp_path, f"settings=[{options}]")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seeds=[-1]", "seeds: -1: expected whole numbers from 0 on"),
        ("sampling={seed: -1}", "sampling of 'dci': seed=-1: expected 0 or more"),
        ("sampling={n_samples: 0}", "n_samples=0"),
        ("sampling={agg_time: 2}", "sampling of 'dci': agg_time 2.0: expected 0"),
        ("sampling={solver: dpm}", "sampling of 'dci': solver 'dpm': expected one of"),
        ("sampling={H: 50}", "sampling of 'dci': height 50: expected a multiple of 16"),
        ("sampling={steps: 1001}", "steps 1001: expected 1 to"),
        ("sampling={eta: 1, solver: euler}", "only the solver ddim has it"),
        ("sampling={precision: fp8}", "precision=fp8: expected one of auto, fp32"),
        ("sampling={dci_layers: nowhere}", "layers 'nowhere': expected some of"),
        ("sampling={zero_terminal_snr: true}", "predicts noise"),
        ("sampling={crop: [1, 2]}", "only SDXL"),
        ("sampling={model: none.yaml}", "no model or weights"),
        ("sampling={checkpoint: none.ckpt}", "no model or weights"),
        ("sampling={auxiliary_noun: photo of a dog}", "is a phrase"),
        ("sampling={negative_prompt: a V9* dog}", "does not name the concept"),
        ("prompts=others.txt", "'a dog' does not name the concept"),
        ("sampling={strength: 0.5}", "strength needs an image to start from"),
        ("sampling={mask: mask.png}", "mask needs an image to start from"),
        ("sampling={init_image: init.png, mask: red.png}", "red.png is no mask"),
        ("sampling={init_image: init.png, strength: 1.5}", "strength=1.5: expected 0"),
        ("sampling={init_image: none.png}", "none.png: no such file"),
        ("sampling={vae: none.safetensors}", "none.safetensors: no such file"),
        ("sampling={loras: [none.safetensors:0.5]}", "no LoRA"),
        ("sampling={loras: ['']}", "sampling: a file's name is empty"),
        ("sampling={vae: ''}", "sampling: a file's name is empty"),
        ("sampling={strength_concept: 2}", "strength_concept 2: expected 0"),
        ("sampling={seeds: '0-3'}", "sampling: seeds is no option of a grid's sampling: they are the grid's"),
        ("settings=[{name: a, sampling: {outdir: here}}]", "sampling of 'a': outdir is no option of a grid's sampling"),
        ("sampling={save-maps: true}", "save_maps is no option"),
        (f"sampling={{auxiliary_noun: auto, model: {SD_V1}}}", "auxiliary_noun=auto needs a CLIP"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(files, tmp_path, override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        suite(files, tmp_path, override)


@pytest.mark.slow
def test_a_grid_trains_on_loras(files, tmp_path):
    """And samples on them, for the concept's base is the model with them."""
    options = [f"loras=[{files / 'style.safetensors'}]", "training.steps=1", "validation.every=0", "training.batch_size=1"]
    option = f"training={json.dumps([*options, 'logging.tensorboard=false'])}"
    (point,) = suite(files, tmp_path, option)
    task = dataclasses.replace(point.training.task, device="cpu")
    point.training.folder.mkdir(parents=True)
    cell.train(task)

    assert Concept.load(point.training.concept_file).base != fingerprint(load_model(TINY))
    sampling = dataclasses.replace(point.task.sampling, n_samples=1, steps=1)
    cell.sample(dataclasses.replace(point.task, device="cpu", prompts=str(files / "prompts.txt"), sampling=sampling))
    assert (point.folder / "samples/00000.png").is_file()
