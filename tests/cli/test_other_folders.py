"""Programs started from a folder without the files that come with them: `configs/...` and `data/...` are found."""

import dataclasses
import json
import sys

import pytest
import torch
from foreign_models import lora_concept
from helpers import ROOT, run_main
from PIL import Image
from safetensors.torch import load_file

from dci.concept.concept_file import Concept
from dci.concept.foreign.export import export
from dci.concept.modifier_tokens import ConceptName
from dci.experiments.suite import load_suite
from dci.finetuning.config_files import finetune_config
from dci.pipeline import Pipeline
from ldm.shipped import find, program

TINY, CAT = "configs/model/tiny.yaml", "data/concepts/cat/00.png"
MODEL = ("--model", TINY)
SMALL = ("--steps", 1, "--n-samples", 1, "--device", "cpu", "--outdir", "out")
V_CAT = ("--prompt", "a V* cat", *SMALL)
QUIET = ("validation.every=0", "logging.tensorboard=false", "--device", "cpu")
SHORT = ("concept.class_noun=cat", "training.steps=1", "training.batch_size=2", *QUIET)


@pytest.fixture(scope="module")
def files(finetuned, tiny_base, tmp_path_factory):
    """A folder with a concept whose configuration names a file that comes with the programs, a LoRA, and samples."""
    folder = tmp_path_factory.mktemp("files")
    dataclasses.replace(finetuned[1], config={"model": TINY}).save(folder / "concept.safetensors")
    torch.manual_seed(5)
    lora = lora_concept(tiny_base, parts=("attn2.to_k",))
    lora = dataclasses.replace(lora, modifiers=torch.zeros(0, 128), names=(ConceptName(("sks",), "cat"),))
    export(lora, tiny_base, "lora", folder)
    (folder / "samples").mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(folder / f"samples/0000{number}.png")
    (folder / "prompts.json").write_text(json.dumps({f"0000{number}": "a <new1> cat" for number in range(2)}))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(files, tmp_path, monkeypatch):
    """The folder that the programs are started from."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LORA = ("mycat-lora.safetensors", "--class-noun", "cat", "--trigger", "sks")
CONCEPT = ("--concept", "concept.safetensors")
TRAIN = ("--config", "configs/train/ico-tiny.yaml")
WEIGHTS, VAE = ("--checkpoint", "data/tiny"), ("--vae", "data/tiny/vae.safetensors")
TWICE = ("concept.safetensors", "concept.safetensors")
CATS = ("--references", "data/concepts/cat", "--regularization", "data/concepts/car")
COMMANDS = {
    "sample a LoRA": ("sample_dci.py", "--concept", *LORA, *MODEL, *V_CAT),
    "sample with weights": ("sample_dci.py", *CONCEPT, *MODEL, "--checkpoint", "data/tiny", *V_CAT),
    "sample by the concept": ("sample_dci.py", *CONCEPT, *V_CAT),
    "sample with an autoencoder": ("sample_dci.py", *CONCEPT, "--vae", "data/tiny/vae.safetensors", *V_CAT),
    "a LoRA on the base": ("txt2img.py", "--prompt", "a cat", "--config", TINY, "--lora", f"{LORA[0]}:0.5", *SMALL),
    "an image to start from": ("txt2img.py", "--prompt", "a cat", "--init-image", CAT, "--strength", 1, *SMALL),
    "a mask": ("txt2img.py", "--prompt", "a cat", "--init-image", CAT, "--mask", "mask.png", *SMALL),
    "prompts": ("sample_dci.py", *CONCEPT, "--from-file", "configs/sweep/tiny-prompts.txt", *SMALL),
    "train": ("train_ico.py", *TRAIN, "data.images=data/concepts/car", *SHORT),
    "train on weights": ("train_ico.py", *TRAIN, *MODEL, *WEIGHTS, *VAE, "--lora", "mycat-lora.safetensors", *SHORT),
    "import": ("import_concept.py", *LORA, *MODEL, *WEIGHTS, "--out", "out/c.safetensors"),
    "export": ("export_concept.py", "concept.safetensors", "--to", "lora", *MODEL, "--out", "out"),
    "export a checkpoint": ("export_concept.py", "concept.safetensors", "--to", "checkpoint", *VAE, "--out", "out"),
    "compress": ("compress_concept.py", "concept.safetensors", "--rank", 1, "--out", "out.safetensors", *MODEL),
    "inspect": ("inspect_concept.py", "concept.safetensors", *MODEL, *WEIGHTS),
    "merge": (
        "merge_concepts.py",
        "concept.safetensors",
        "data/demo/cake.safetensors",
        "--out",
        "out.safetensors",
        "--captions",
        "data/captions.txt",
        *MODEL,
    ),
    "evaluate": ("evaluate.py", "--samples", ".", *CATS, "--out", "out", "--resamples", 9, "--device", "cpu"),
    "a suite": ("compare.py", "--config", "configs/eval/tiny.yaml", "--dry-run"),
    "a sweep": ("sweep.py", "--config", "configs/sweep/tiny.yaml", "--dry-run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_files_that_come_with_the_programs_are_found(name, elsewhere):
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    mask.save("mask.png")
    run_main(*COMMANDS[name])


@pytest.mark.slow
def test_a_concept_imported_elsewhere_is_sampled_from_anywhere(elsewhere, monkeypatch):
    """Its configuration has the whole path of the model, not a name that other folders may not know."""
    run_main("import_concept.py", *LORA, *MODEL, "--out", "imported.safetensors")
    assert Concept.load("imported.safetensors").config["model"] == str(ROOT / TINY)
    other = elsewhere / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run_main("sample_dci.py", "--concept", elsewhere / "imported.safetensors", *V_CAT)
    assert (other / "out/samples/00000.png").is_file()


def test_a_users_own_configurations_name_shipped_files(elsewhere):
    """By the paths that the shipped ones use: what is not beside the configuration comes with the programs."""
    train = elsewhere / "own.yaml"
    train.write_text("concept: {class_noun: cat}\ndata: {images: data/concepts/cat, regularization: data/concepts/car}\n")
    config = finetune_config(train)
    assert (config.model, config.data.images) == (str(ROOT / TINY), str(ROOT / "data/concepts/cat"))
    (elsewhere / "suite.yaml").write_text(
        "name: own\nconcepts: [{class_noun: cat, images: data/concepts/cat}]\nprompts: configs/sweep/tiny-prompts.txt\n"
        "methods: [{name: ico, config: configs/train/ico-tiny.yaml}, {name: own, config: own.yaml}]\n"
    )
    suite = load_suite("suite.yaml")
    assert suite.prompts == str(ROOT / "configs/sweep/tiny-prompts.txt")
    assert [method.config for method in suite.methods] == [str(ROOT / "configs/train/ico-tiny.yaml"), str(train)]
    (elsewhere / "configs").mkdir()
    (elsewhere / "data/concepts/cat").mkdir(parents=True)
    assert finetune_config(train).data.images == str(elsewhere / "data/concepts/cat")  # one's own go first
    assert find(TINY) == ROOT / TINY


@pytest.mark.slow
def test_python_users_name_them_too(elsewhere):
    pipeline = Pipeline.load("concept.safetensors", TINY, "data/tiny", device="cpu")
    shipped = load_file(ROOT / "data/tiny/vae.safetensors")["first_stage_model.decoder.conv_out.bias"]
    assert torch.equal(pipeline.model.autoencoder.state_dict()["decoder.conv_out.bias"], shipped.float())


@pytest.mark.parametrize(
    ("started", "by", "command"),
    [
        (["/usr/bin/dci", "train"], ["/usr/bin/python", "/usr/bin/dci", "train"], "dci sample"),
        (["/a/dci/__main__.py", "train"], ["/usr/bin/python", "-m", "dci", "train"], "python -m dci sample"),
        (["scripts/train_ico.py"], ["python", "scripts/train_ico.py"], "python scripts/sample_dci.py"),
        ([str(ROOT / "scripts/train_ico.py")], ["python"], f"python {ROOT / 'scripts/sample_dci.py'}"),
        (["/my/notebook.py"], ["python", "/my/notebook.py"], "dci sample"),
        ([""], ["python"], "dci sample"),
    ],
)
def test_a_hint_names_the_kind_of_program_that_was_started(started, by, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", by)
    assert program("sample_dci.py", "sample") == command
