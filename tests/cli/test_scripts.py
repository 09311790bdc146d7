"""The programs as a user runs them: what they write, and one line for each mistake."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, learned_concept, mostly_slow, ok, pixels, refused, run, run_alone, run_here, run_main
from PIL import Image
from safetensors.torch import load_file, save_file

CONFIG = ROOT / "configs/train/ico-tiny.yaml"


@pytest.fixture(scope="session")
def mixed_images(tmp_path_factory):
    """Images of all sizes and kinds: a rotated JPEG, a transparent PNG, a WebP, a tiny palette image."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = Image.effect_noise((300, 200), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise.save(folder / "turned.jpg", exif=exif)
    transparent = Image.new("RGBA", (90, 120), (0, 0, 0, 0))
    transparent.paste((200, 30, 30, 255), (20, 20, 60, 90))
    transparent.save(folder / "transparent.png")
    noise.resize((1000, 40)).save(folder / "Wide.WEBP")
    noise.convert("P").resize((20, 20)).save(folder / "palette.png")
    (folder / "Thumbs.db").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image either")
    return folder


@pytest.fixture(scope="session")
def trained(mixed_images, tmp_path_factory):
    """A short run on those images; returns (what it printed, its run folder)."""
    logs = tmp_path_factory.mktemp("logs")
    out = ok(
        run(
            "train_ico.py",
            "--config",
            CONFIG,
            "--name",
            "short",
            "--logdir",
            logs,
            f"data.images={mixed_images}",
            "concept.class_noun=dog",
            "training.steps=4",
            "training.save_every=3",
            "validation.every=2",
            "validation.steps=3",
            "validation.n_samples=2",
        )
    )
    (run_folder,) = logs.iterdir()
    return out, run_folder


@pytest.fixture(scope="module")
def concept(tiny_base, tmp_path_factory):
    """A concept as a training leaves it."""
    file = tmp_path_factory.mktemp("concept") / "concept.safetensors"
    learned_concept(copy.deepcopy(tiny_base), "dog", 0.02).save(file)
    return file


@pytest.mark.slow
def test_a_run_folder_holds_everything(trained, mixed_images):
    out, run_folder = trained
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_short", run_folder.name)
    assert str(run_folder) in out
    config = yaml.safe_load((run_folder / "configs/config.yaml").read_text())
    assert config["concept"]["class_noun"] == "dog"
    assert config["training"]["steps"] == 4
    assert config["data"]["images"] == str(mixed_images)
    assert sorted(f.name for f in (run_folder / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert (run_folder / "checkpoints/concept-000003.safetensors").is_file()
    assert list(run_folder.glob("events.out.tfevents.*"))
    assert load_file(run_folder / "concept.safetensors")["contexts.prefix"].shape == (4, 3, 128)


@pytest.mark.slow
def test_a_resolved_configuration_can_be_run_again(trained, tmp_path):
    config = trained[1] / "configs/config.yaml"
    ok(run("train_ico.py", "--config", config, "--logdir", tmp_path, "validation.every=0", cwd=tmp_path))
    (again,) = tmp_path.glob("*_short/concept.safetensors")
    first, second = load_file(trained[1] / "concept.safetensors"), load_file(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def sample(concept, outdir, *args):
    common = ("--concept", concept, "--prompt", "a V* dog on the beach", "--steps", 3, "--outdir", outdir)
    return run("sample_dci.py", *common, *args)


def test_sampling_writes_images_grid_and_record(concept, tmp_path):
    out = ok(sample(concept, tmp_path, "--n-samples", 3, "--agg_lambda", 0.5, "--verbose", "--batch-size", 2))
    assert "'a <new1> <new2> dog on the beach', concept at [1, 2, 3], length 8" in out
    assert "'a dog on the beach', noun at [1], length 6" in out
    assert sorted(f.name for f in (tmp_path / "samples").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert pixels(tmp_path / "samples/00000.png").shape == (64, 64, 3)
    assert pixels(tmp_path / "grid.png").shape == (130, 130, 3)
    record = json.loads((tmp_path / "prompts.json").read_text())
    entry = record["00002"]
    assert entry["prompt"] == "a V* dog on the beach"
    assert (entry["index"], entry["seed"], entry["steps"], entry["dci"]["agg_lambda"]) == (2, 0, 3, 0.5)

    # The record makes the image again; one at a time instead of two; earlier images are kept.
    ok(sample(concept, tmp_path, "--n-samples", 3, "--agg-lambda", entry["dci"]["agg_lambda"], "--batch-size", 1))
    assert len(list((tmp_path / "samples").iterdir())) == 6
    for i in range(3):
        difference = pixels(tmp_path / f"samples/0000{i}.png") - pixels(tmp_path / f"samples/0000{i + 3}.png")
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_the_options_of_dci_have_an_effect(concept, tmp_path):
    for name, args in {
        "default": [],
        "plain": ["--no-dci"],
        "one": ["--agg-lambda", "-1e6"],
        "zero": ["--agg-time", 0],
        "cat": ["--auxiliary-noun", "cat", "--agg-lambda", 2],
        "separate": ["--separate-guidance", "--agg-lambda", 2],
    }.items():
        ok(sample(concept, tmp_path / name, "--n-samples", 1, "--steps", 12, *args))
    images = {f.parent.parent.name: pixels(f) for f in tmp_path.glob("*/samples/00000.png")}
    assert len(images) == 6
    for name in ("one", "zero"):
        assert np.abs(images[name] - images["plain"]).max() <= 1
    for name in ("default", "cat", "separate"):
        assert np.abs(images[name] - images["plain"]).max() > 8


@pytest.mark.slow
def test_txt2img(tmp_path):
    ok(run_alone("txt2img.py", "--prompt", "a dog on the beach", "--n-samples", 2, "--ddim_steps", 4, "--outdir", tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 2
    record = json.loads((tmp_path / "prompts.json").read_text())
    assert record["00001"]["steps"] == 4


@pytest.mark.slow
def test_sheets(tmp_path):
    for i in range(3):
        Image.new("RGB", (10, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    sheet = tmp_path / "sheet.png"
    run_main("contact_sheet.py", tmp_path, "--columns", 2, "--scale", 3, "--out", sheet)
    assert pixels(sheet).shape == (54, 66, 3)
    run_main("sheet_base.py", "--images", 2, "--steps", 2, "--out", sheet)
    assert pixels(sheet).shape[:2] == (142, 1052)
    (tmp_path / "pairs.txt").write_text("a {} and a hat\nthe {} at night\n")
    pairs = ("--prompts", tmp_path / "pairs.txt", "--nouns", "owl, cat,", "--each", 2, "--steps", 2, "--out", sheet)
    run_main("sheet_base.py", *pairs)
    assert pixels(sheet).shape[:2] == (2 * 142 + 4, 4 * 128 + 3 * 4)


@pytest.mark.slow
def test_a_mistake_is_one_line_for_the_shell(tmp_path):
    result = run_alone("train_ico.py", "--config", CONFIG, f"data.images={tmp_path}/none")
    refused(result, "error: no folder", f"{tmp_path}/none")


@pytest.fixture
def mistaken(tmp_path):
    """A folder of files that no program can use: `{}/NAME` in an argument is one of them."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/text.jpg").write_text("this is text")
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "short.yaml").write_text("data: {images: here}")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "file").touch()
    return tmp_path


QUICK_TRAININGS = [
    (("data.images={}/empty",), ("no images in", "empty", ".jpg")),
    (("data.imags=x",), ("unknown key 'data.imags'", "did you mean 'data.images'")),
    (("--frobnicate",), ("--frobnicate",)),
    (("--logdir", "{}/file"), ("--logdir", "file is not a folder")),
]
REFUSED_TRAININGS = [
    *QUICK_TRAININGS,
    (("data.images={}/broken",), ("text.jpg is not a readable image",)),
    (("trainig.steps=5",), ("unknown key 'trainig'", "did you mean 'training'")),
    (("training.steps=soon",), ("the command line: training.steps=soon: expected a value of type int",)),
    (("concept.initial_words=3",), ("concept.initial_words=3: expected a value of type list[str]",)),
    (("training.steps=0",), ("training.steps=0",)),
    (("training.precision=half",), ("training.precision=half", "bf16-mixed")),
    (("training.learning_rate=nan",), ("training.learning_rate=nan",)),
    (("validation.every=-1",), ("validation.every=-1", "0 or more")),
    (("concept.initial_words=[xyzzyplugh]",), ("'xyzzyplugh' is", "tokens")),
    (("nonsense",), ("'nonsense' is not an override",)),
    (("concept.initial_words=[]",), ("0 modifier tokens",)),
    (("concept.class_noun=' '",), ("noun is empty",)),
    (("data.regularization=/nowhere",), ("no folder /nowhere",)),
    (("--config", "{}/none.yaml"), ("no configuration file",)),
    (("--config", "{}/bad.yaml"), ("not readable as YAML",)),
    (("--config", "{}/short.yaml"), ("concept.class_noun must be given",)),
    (("training.trainable=all",), ("training.trainable=all", "crossattn-kv, crossattn, none")),
    (("data.augment=rotate",), ("data.augment=rotate", "random-resize")),
    (("data.on_bad_image=ignore",), ("data.on_bad_image=ignore", "error, skip")),
    (("data.augment=random-resize", "data.cache_latents=true"), ("data.cache_latents=true does not go with",)),
    (("context.template=photo",), ("context.template='photo'", "{}")),
    (("generate.prompts=[photo]",), ("generate.prompts", "{}")),
    (("data.masked_loss=true",), ("no mask for", "00.mask.png")),
    (("data.background_weight=2",), ("data.background_weight=2",)),
    (("training.precision=fp16",), ("training.precision=fp16 needs a GPU",)),
    (("training.batch_size=5", "training.devices=2"), ("training.batch_size=5 cannot be shared evenly",)),
    (("training.batch_size=1", "data.regularization=generate"), ("leaves no room",)),
    (("training.keep_last=0",), ("training.keep_last=0",)),
    (("logging.wandb=project",), ("needs the package wandb",)),
    (("concept.initial_words=[ktn,pll,ucd,cat]",), ("4 modifier tokens",)),
    (("--rank", "3", "--energy", "0.5"), ("exclude each other",)),
]


@pytest.mark.parametrize(("args", "words"), mostly_slow(REFUSED_TRAININGS, *QUICK_TRAININGS))
def test_training_refuses_a_mistake(args, words, mistaken, capfd):
    args = [arg.replace("{}", str(mistaken)) for arg in args]
    given = ("--config", CONFIG, "--logdir", mistaken / "logs", "--device", "cpu")
    refused(run_here(capfd, "train_ico.py", *given, *args), *words)
    assert not (mistaken / "logs").exists()


QUICK_SAMPLING = ("--prompt", "a dog on the beach"), ("does not name the concept", "a V* dog on the beach")
REFUSED_SAMPLING = [
    QUICK_SAMPLING,
    (("--concept", "{}/none.safetensors"), ("no file",)),
    (("--concept", "{}/text.safetensors"), ("not a whole .safetensors file",)),
    (("--concept", "data/tiny/vae.safetensors"), ("not a concept file",)),
    (("--agg-time", "2"), ("--agg-time 2.0",)),
    (("--H", "50"), ("--H 50", "multiple of 16")),
    (("--steps", "0"), ("--steps", "from 1 on")),
    (("--use-dci",), ("--use-dci",)),
    (("--seed", "-2"), ("-2", "or -1")),
    (("--gain", "-1"), ("--gain -1.0",)),
    (("--outdir", "{}/file"), ("is a file",)),
    (("--agg-lambda", "nan"), ("--agg-lambda", "finite")),
    (("--device", "nowhere"), ("--device nowhere",)),
    (("--model", "configs/model/sd-v1.yaml"), ("names no checkpoint",)),
]


@pytest.mark.parametrize(("args", "words"), mostly_slow(REFUSED_SAMPLING, QUICK_SAMPLING))
def test_sampling_refuses_a_mistake(args, words, concept, mistaken, capfd):
    args = [arg.replace("{}", str(mistaken)) for arg in args]
    given = ["--prompt", "a V* dog", "--outdir", mistaken / "out"]
    if "--concept" not in args:  # repeated, the option takes the files of both together
        given += ["--concept", concept]
    refused(run_here(capfd, "sample_dci.py", *given, *args), *words)
    assert not (mistaken / "out").exists()


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """The embedded model's weights, but for a UNet of the same shapes with other values."""
    base = tmp_path_factory.mktemp("base")
    for part in ("text", "vae", "unet"):
        state = load_file(ROOT / f"data/tiny/{part}.safetensors")
        if part == "unet":
            state = {name: tensor * 1.01 for name, tensor in state.items()}
        save_file(state, base / f"{part}.safetensors")
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left_out", "words"),
    [((), "learned on the base model 'tiny'"), (("unet.safetensors",), "lacks model.diffusion_model.")],
)
def test_sampling_refuses_another_base_model(left_out, words, concept, other_base, tmp_path, capfd):
    base = shutil.copytree(other_base, tmp_path / "base", ignore=shutil.ignore_patterns(*left_out))
    given = ("--concept", concept, "--prompt", "a V* dog", "--outdir", tmp_path / "out")
    refused(run_here(capfd, "sample_dci.py", *given, "--checkpoint", base), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_regularization_images_are_generated_and_counted(tmp_path):
    out = ok(
        run(
            "train_ico.py",
            "--config",
            CONFIG,
            "--logdir",
            tmp_path,
            "--device",
            "cpu",
            "data.regularization=generate",
            "generate.number=3",
            "generate.steps=2",
            "training.steps=1",
            "training.batch_size=4",
            "validation.every=0",
            "--rank",
            2,
        )
    )
    assert "Regularization: 3 images of 'cat' made by the base model" in out
    assert "Latents: cached, 8 images" in out
    assert "rank 2" in out
    assert "reconstruction error" in out
    (run_folder,) = tmp_path.glob("*_ico-tiny")
    assert any(name.endswith("to_k.weight.u") for name in load_file(run_folder / "concept.safetensors"))
