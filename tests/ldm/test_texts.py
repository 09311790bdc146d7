"""Paths whose bytes are no UTF-8, and names with dollar signs: read back by a shell, seen by a reader, never a traceback."""

import csv
import io
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from helpers import POSIX, ROOT, refused, run_here, run_main
from matplotlib.figure import Figure
from PIL import Image

from ldm.checkpoint import save_weights
from ldm.formats.weights import read_file
from ldm.texts import plotted, readable, shell_words

WORDS = [os.fsdecode(b"caf\xe9 #2"), os.fsdecode(b"it's\xff\\n"), "it's", "a b", "", "~", "${HOME}", "naïve \U0001f436"]


@POSIX
def test_a_shell_reads_back_the_bytes():
    command = "printf '%s\\0' " + shell_words(WORDS)
    seen = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert seen.split(b"\0")[:-1] == [os.fsencode(word) for word in WORDS]


def test_text_that_utf_8_can_hold_stays():
    assert [readable(word) == word for word in WORDS] == [False, False, *[True] * (len(WORDS) - 2)]
    assert readable(WORDS[0]) == r"caf\udce9 #2"


def drawn(text, **options):
    figure = Figure((3, 1))
    figure.text(0.1, 0.4, text, **options)
    content = io.BytesIO()
    figure.savefig(content, format="raw")
    return np.frombuffer(content.getvalue(), np.uint8)


@pytest.mark.parametrize("name", ["$x_1$", "$", "$$", "5$ and $\\frac{", "plain"])
def test_a_plotted_name_is_no_formula(name):
    np.testing.assert_array_equal(drawn(plotted(name)), drawn(name, parse_math=False))


def folder_of(path):
    (path / "samples").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((64, 64), 60 + i).convert("RGB").save(path / f"samples/{i}.png")
    prompts = {str(i): {"prompt": f"a $cat$ {i}", "concept": str(path / "c.safetensors")} for i in range(3)}
    (path / "prompts.json").write_text(json.dumps(prompts))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Glyph")
def test_a_report_of_such_folders(tmp_path, capsys):
    odd = folder_of(tmp_path / os.fsdecode(b"odd\xff $\\frac{a$"))
    references = tmp_path / os.fsdecode(b"my dogs\xe9")
    references.mkdir()
    for file in odd.glob("samples/*.png"):
        os.link(file, references / file.name)
    out = tmp_path / os.fsdecode(b"out\xfe")
    named = folder_of(tmp_path / "b")
    own = ("--references", references, "--out", out, "--resamples", 20, "--device", "cpu")
    run_main("evaluate.py", "--samples", odd, f"b={named}", *own)
    assert r"odd\udcff" in capsys.readouterr().out
    assert r"odd\udcff $\frac{a$" in (out / "report.html").read_text(encoding="utf-8")
    with open(out / "summary.csv", encoding="utf-8", newline="") as file:
        assert r"odd\udcff $\frac{a$" in next(csv.DictReader(file)).values()
    assert json.loads((out / "scores.json").read_text(encoding="utf-8"))["runs"][0]["name"] == odd.name


@pytest.mark.slow
def test_training_and_sampling_with_such_paths(tmp_path, capsys):
    images, logs = (tmp_path / os.fsdecode(name) for name in (b"im\xff #1", b"lo\xfegs"))
    images.mkdir()
    Image.effect_noise((64, 64), 80).convert("RGB").save(images / os.fsdecode(b"\xe9.png"))
    short = ("concept.class_noun=dog", "training.steps=1", "validation.every=0", "--device", "cpu")
    config = ("--config", ROOT / "configs/train/ico-tiny.yaml", "--logdir", logs)
    run_main("train_ico.py", *config, f"data.images={images}", *short)
    assert r"$'" in capsys.readouterr().out
    (concept,) = logs.glob("*/concept.safetensors")
    drawn = ("--prompt", "a V* dog", "--steps", 1, "--n-samples", 1, "--device", "cpu")
    run_main("sample_dci.py", "--concept", concept, *drawn, "--outdir", tmp_path / "out")
    metadata = json.loads((tmp_path / "out/prompts.json").read_text(encoding="utf-8"))["00000"]
    assert metadata["concept"] == str(concept)
    with Image.open(tmp_path / "out/samples/00000.png") as image:
        assert r"lo\udcfegs" in image.text["parameters"]


def test_files_of_weights_at_such_paths(tmp_path, tiny_base):
    odd = tmp_path / os.fsdecode(b"\xff.dir")
    odd.mkdir()
    state = {name: weight.clone() for name, weight in tiny_base.state_dict().items()}
    save_weights(state, odd / "model.safetensors")
    torch.save({"state_dict": state}, odd / "model.ckpt")
    name = "model.diffusion_model.out.2.bias"
    for file in odd.iterdir():
        assert torch.equal(read_file(file)[0][name].half(), state[name].half())


@pytest.mark.parametrize("name", ["a/b", "../b", "/", "..", "."])
def test_a_runs_name_is_no_path(tmp_path, capfd, name):
    config = ROOT / "configs/train/ico-tiny.yaml"
    refused(run_here(capfd, "train_ico.py", "--config", config, "--logdir", tmp_path, "--name", name), f"name '{name}'")
    assert not list(tmp_path.iterdir())
