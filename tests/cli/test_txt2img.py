"""txt2img.py: prompt files, images to start from, masks, precision, and what is written into each PNG."""

import json

import numpy as np
import pytest
from helpers import ROOT, pixels, refused, run_here, run_main
from PIL import Image, ImageDraw

QUICK = ("--steps", 4, "--n-samples", 1)


def sample(folder, *args):
    run_main("txt2img.py", *QUICK, "--outdir", folder, *args)
    return sorted((folder / "samples").glob("*.png"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An image to start from, and a mask of the same size: the left half is to be painted."""
    folder = tmp_path_factory.mktemp("start")
    image = Image.new("RGB", (96, 64), (40, 120, 200))
    ImageDraw.Draw(image).ellipse((30, 20, 60, 50), fill=(230, 200, 40))
    image.save(folder / "image.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    mask.save(folder / "mask.png")
    return folder


@pytest.mark.slow
def test_every_line_of_a_file_is_sampled(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog on the beach\n\n  a car in the snow \n")
    files = sample(tmp_path / "o", "--from-file", tmp_path / "prompts.txt", "--n-iter", 2)
    record = json.loads((tmp_path / "o/prompts.json").read_text())
    assert [f.stem for f in files] == list(record)
    assert [(r["prompt"], r["index"]) for r in record.values()] == [
        ("a dog on the beach", 0),
        ("a dog on the beach", 1),
        ("a car in the snow", 0),
        ("a car in the snow", 1),
    ]
    alone = sample(tmp_path / "alone", "--prompt", "a car in the snow", "--n-iter", 2)
    assert np.abs(pixels(files[3]) - pixels(alone[1])).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["plms", "dpmpp_2m", "dpm++2m-karras", "euler", "Euler_a"])
def test_solvers_give_different_images(tmp_path, solver):
    plain = sample(tmp_path / "ddim", "--prompt", "a dog")
    other = sample(tmp_path / "other", "--prompt", "a dog", "--solver", solver, "--spacing", "trailing")
    assert np.abs(pixels(plain[0]) - pixels(other[0])).mean() > 1


def test_parameters_are_written_as_webui_writes_them(tmp_path):
    prompt, negative = "a dog, on the beach: now", "a house"
    file = sample(tmp_path, "--prompt", prompt, "--negative-prompt", negative, "--solver", "euler_a", "--seed", 5)[0]
    first, second, third = Image.open(file).text["parameters"].splitlines()
    assert (first, second) == (prompt, "Negative prompt: a house")
    assert third.startswith("Steps: 4, Sampler: Euler a, CFG scale: 6.0, Seed: 5, Size: 64x64, ")


@pytest.mark.slow
def test_a_negative_prompt_changes_the_image(tmp_path):
    plain = sample(tmp_path / "a", "--prompt", "a dog")
    negative = sample(tmp_path / "b", "--prompt", "a dog", "--negative-prompt", "a dog on the beach")
    assert np.abs(pixels(plain[0]) - pixels(negative[0])).mean() > 1


@pytest.mark.slow
def test_strength_leads_away_from_the_image(tmp_path, start):
    original = pixels(start / "image.png")
    distances = []
    for strength in (0, 0.5, 1):
        file = sample(
            tmp_path / str(strength), "--prompt", "a dog", "--init-image", start / "image.png", "--strength", strength
        )[0]
        assert Image.open(file).size == (96, 64)
        distances.append(np.abs(pixels(file) - original).mean())
    assert distances[0] < 10 < distances[2]
    assert distances == sorted(distances)


@pytest.mark.slow
def test_what_the_mask_keeps_is_kept(tmp_path, start):
    file = sample(tmp_path, "--prompt", "a dog", "--init-image", start / "image.png", "--mask", start / "mask.png")[0]
    change = np.abs(pixels(file) - pixels(start / "image.png")).max(-1)
    assert change[:, 48:].max() == 0
    assert change[:, :48].mean() > 10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same(tmp_path, precision):
    full = sample(tmp_path / "full", "--prompt", "a dog")
    half = sample(tmp_path / "half", "--prompt", "a dog", "--precision", precision, "--channels-last", "--vae-tile", 32)
    assert np.abs(pixels(full[0]) - pixels(half[0])).mean() < 6


@pytest.mark.slow
def test_mistakes_are_one_line_each(capfd, tmp_path, start):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    image = start / "image.png"
    for args, words in (
        ([], ["--prompt", "--from-file"]),
        (["--prompt", "x", "--from-file", tmp_path / "empty.txt"], ["not both"]),
        (["--from-file", tmp_path / "empty.txt"], ["empty.txt", "no prompts"]),
        (["--from-file", tmp_path / "binary.txt"], ["binary.txt", "UTF-8"]),
        (["--from-file", tmp_path / "none.txt"], ["none.txt"]),
        (["--prompt", "x", "--solver", "heun"], ["--solver 'heun': expected one of", "euler"]),
        (["--prompt", "x", "--solver", "euler", "--eta", 0.5], ["--eta 0.5", "ddim"]),
        (["--prompt", "x", "--mask", image], ["--mask", "--init-image"]),
        (["--prompt", "x", "--strength", 0.5], ["--strength", "--init-image"]),
        (["--prompt", "x", "--init-image", image, "--strength", 1.5], ["strength 1.5", "0"]),
        (["--prompt", "x", "--init-image", image, "--mask", tmp_path / "small.png"], ["5 x 5", "96 x 64"]),
        (["--prompt", "x", "--init-image", tmp_path / "empty.txt"], ["empty.txt", "image"]),
        (["--prompt", "x", "--checkpoint", ROOT / "README.md"], ["README.md is no model: expected a YAML file"]),
        (["--prompt", "x", "--vae-tile", 3], ["--vae-tile 3"]),
        (["--prompt", "x", "--precision", "fp8"], ["fp8", "fp32"]),
    ):
        refused(run_here(capfd, "txt2img.py", "--outdir", tmp_path / "o", *args), *words)
    assert not (tmp_path / "o").exists()
