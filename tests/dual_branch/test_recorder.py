"""Maps, steps, the auxiliary noun's choice, and images from Python."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, pixels, refused, run_here, run_main, sample_images
from PIL import Image

from dci import Pipeline
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.attention_maps import MapRecord, observer
from dci.dual_branch.integration import DualBranch, TokenMasks, integrating_attend
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.predictions import StepRecord, choose_steps
from dci.evaluation.auxiliary_noun import default_candidates, score_nouns
from dci.evaluation.encoders import load_encoder
from ldm.errors import UserError
from ldm.images import to_images
from ldm.unet import CrossLayer

TOKENS = ("<new1>", "<new2>")
PROMPT = parse_prompt("a V* cat on the beach", ConceptName(TOKENS, "cat"))


@pytest.fixture(scope="module")
def concept_file(finetuned, tmp_path_factory):
    file = tmp_path_factory.mktemp("concept") / "concept.safetensors"
    finetuned[1].save(file)
    return file


# Maps.


def test_maps_are_the_softmax_over_the_named_tokens():
    q, k, v = torch.randn(3, 2, 15, 8), torch.randn(3, 2, 77, 8), torch.randn(3, 2, 77, 8)
    masks, seen = TokenMasks.of([PROMPT]), []
    observe = observer(seen.append, 981, 4, CrossLayer("middle_block.1", "middle", 2), masks, (6, 10))
    integrating_attend(masks, DualBranch(agg_lambda=0.3, gain=20), slice(1, 2), slice(2, 3), observe)(q, k, v)
    (maps,) = seen
    scores = torch.exp(torch.einsum("bhnd,bhld->bhnl", q, k) / 8**0.5)
    shares = (scores / scores.sum(-1, keepdim=True)).view(3, 2, 3, 5, 77)
    # "a <new1> <new2> cat": tokens 2, 3, 4 behind the start token; "a cat": token 2.
    torch.testing.assert_close(maps.concept, shares[1:2, ..., 2:5].sum(-1))
    torch.testing.assert_close(maps.auxiliary, shares[2:3, ..., 2])
    assert maps.weight.shape == (1, 2, 3, 5)
    assert (maps.t, maps.number) == (981, 4)


@pytest.mark.slow
def test_looking_on_changes_nothing(finetuned):
    model, concept = finetuned
    options, dual = sampling_options(model, steps=8), dual_branch(model, agg_time=0.4)
    record, steps = MapRecord(), StepRecord()
    plain = sample_images(model, concept, PROMPT, [0, 1], options, dual)
    seen = sample_images(model, concept, PROMPT, [0, 1], options, dual, steps.record, maps=record.record)
    assert torch.equal(seen, plain)
    arrays = record.arrays(1)
    assert arrays["timesteps"].tolist() == [t for t in steps.timesteps if t > 600]
    assert [str(name).split(" ")[0] for name in arrays["layers"]] == [f"layer{i}" for i in range(10)]
    for i, side in enumerate((16, 8, 4, 4, 4, 4, 8, 8, 16, 16)):
        for kind in ("weight", "concept", "auxiliary"):
            values = arrays[f"layer{i}/{kind}"]
            assert values.shape == (3, side, side)
            assert (values >= 0).all() and (values <= 1).all()  # noqa: PT018
        # With lambda 0 the concept branch never has less than half.
        assert (arrays[f"layer{i}/weight"] >= 0.5).all()
    # The last prediction is the image; the auxiliary branch has none at the end.
    last = steps.images(model, 1, [0, 7])
    assert np.abs(np.asarray(last.concept[1]).astype(int) - np.asarray(to_images(plain)[1]).astype(int)).mean() < 3
    assert last.auxiliary[0] is not None
    assert last.auxiliary[1] is None
    assert steps.dual_steps == 3


@pytest.mark.parametrize(("number", "dual"), [(50, 15), (8, 3), (200, 60), (50, 0), (50, 50), (11, 1), (51, 2)])
def test_steps_that_are_shown(number, dual):
    shown = choose_steps(number, dual)
    assert shown == sorted(set(shown))
    assert {0, max(dual - 1, 0), min(dual, number - 1), number - 1} <= set(shown)
    assert min(number, 6) <= len(shown) <= 10
    assert all(b - a <= max(number // 4, 1) + 1 for a, b in pairwise(shown))


@pytest.mark.slow
def test_sheets_of_a_program(concept_file, tmp_path, capfd):
    common = ("--concept", concept_file, "--prompt", "a V* cat on the beach", "--steps", 8, "--n-samples", 2)
    run_main(
        "sample_dci.py",
        *common,
        "--save-maps",
        "--save-steps",
        "--outdir",
        tmp_path,
        "--dci-layers",
        "16,middle",
        "--auxiliary-weights",
        "base",
        "--shared-noise",
        "--token-sharpness",
        8,
        "--pixel-sharpness",
        12,
    )
    for name in ("00000", "00001"):
        files = sorted(file.name for file in (tmp_path / "maps").glob(f"{name}*"))
        assert files == [f"{name}-auxiliary.png", f"{name}-concept.png", f"{name}-weight.png", f"{name}.npz"]
        with np.load(tmp_path / f"maps/{name}.npz") as maps:
            assert maps["timesteps"].tolist() == [876, 751]
            assert maps["layer0/weight"].shape == (2, 16, 16)
            assert [str(layer).split()[0] for layer in maps["layers"]] == ["layer0", "layer3", "layer8", "layer9"]
        # Four layers and two steps; two branches and eight steps: taller, or wider.
        assert pixels(tmp_path / f"maps/{name}-weight.png").shape[0] > 500
        assert pixels(tmp_path / f"steps/{name}.png").shape[1] > 1000
    dci = json.loads((tmp_path / "prompts.json").read_text())["00001"]["dci"]
    assert dci["layers"] == ["16", "middle"]
    assert (dci["auxiliary_weights"], dci["shared_noise"]) == ("base", True)
    assert (dci["token_sharpness"], dci["pixel_sharpness"]) == (8, 12)

    def sampling(*args):
        return run_here(capfd, "sample_dci.py", *common, "--outdir", tmp_path / "none", *args)

    refused(sampling("--save-maps", "--no-dci"), "--save-maps needs steps with both branches")
    refused(sampling("--save-maps", "--agg-time", 0), "--save-maps needs steps with both branches")
    refused(sampling("--save-maps", "--compile"), "--save-maps cannot look into a compiled UNet")
    refused(sampling("--dci-layers", "12"), "--dci-layers '12': expected some of", "16, 8, 4")
    refused(sampling("--auxiliary-noun", "auto", "--clip", "nonsense"), "no encoder 'nonsense'")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_no_sheets_unless_asked_for(concept_file, tmp_path):
    run_main("sample_dci.py", "--concept", concept_file, "--prompt", "a V*", "--steps", 2, "--outdir", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("[!.]*")) == ["grid.png", "prompts.json", "samples"]


# The auxiliary noun.


@pytest.mark.slow
def test_the_noun_that_the_base_model_obeys_is_chosen(finetuned, tiny_base):
    concept, clip = finetuned[1], load_encoder("tiny")
    options = sampling_options(tiny_base, steps=8, scale=5.0)
    prompts = ["a V* in the snow", "a V* cat on the beach"]
    scores = score_nouns(tiny_base, concept, prompts, ["car", "cat"], clip, options, images=2)
    assert [score.noun for score in scores] == ["cat", "car"]
    assert scores[0].clip_t > scores[1].clip_t + 0.02
    assert scores[:1] == score_nouns(tiny_base, concept, prompts, ["cat"], clip, options, images=2)
    with pytest.raises(UserError, match="no candidates"):
        score_nouns(tiny_base, concept, prompts, [], clip, options)


def test_candidates_by_the_class_noun():
    assert default_candidates("dog") == ["dog", "animal"]
    assert default_candidates("tortoise plushy") == ["tortoise plushy", "plushy", "toy"]
    assert default_candidates("gadget") == ["gadget", "object"]


@pytest.mark.slow
def test_auto_says_what_it_chose(concept_file, tmp_path, capfd):
    run_main(
        "sample_dci.py",
        "--concept",
        concept_file,
        "--prompt",
        "V* in the snow",
        "--steps",
        8,
        "--n-samples",
        1,
        "--auxiliary-noun",
        "auto",
        "--auxiliary-candidates",
        "car, cat",
        "--outdir",
        tmp_path,
    )
    out = capfd.readouterr().out
    scores = dict(reversed(line.split(maxsplit=1)) for line in re.findall(r"^ +(-?\d\.\d{4}  \w+)$", out, re.MULTILINE))
    assert set(scores) == {"car", "cat"}
    best = max(scores, key=lambda noun: float(scores[noun]))
    assert f"Auxiliary noun: {best}" in out
    entry = json.loads((tmp_path / "prompts.json").read_text())["00000"]
    assert entry["auxiliary_prompt"] == f"{best} in the snow"


# From Python.


@pytest.mark.slow
def test_importing_the_package_is_light():
    code = "import sys, dci; assert dci.__version__; assert 'torch' not in sys.modules; assert callable(dci.Pipeline)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "saved"), [("README.md", 1), ("docs/python.md", 4)])
def test_the_first_lines_of_python(page, saved, concept_file, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "logs/RUN").mkdir(parents=True)
    (tmp_path / "logs/RUN/concept.safetensors").write_bytes(concept_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert len(names["images"]) == 4
    assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in names["images"])
    assert len(list(Path(tmp_path).glob("*.png"))) == saved


@pytest.mark.slow
def test_the_pipeline_gives_what_the_sampler_gives(finetuned, concept_file, tiny_base):
    model, concept = finetuned
    pipeline = Pipeline.load(concept_file, device="cpu")
    dual = dual_branch(model, agg_time=0.5, agg_lambda=0.5)
    expected = sample_images(
        model, concept, PROMPT, [0, 1], sampling_options(model, steps=4, seed=3), dual, negative="a car"
    )
    found = pipeline("a V* cat on the beach", 2, seed=3, steps=4, agg_time=0.5, agg_lambda=0.5, negative="a car")
    difference = np.stack(found).astype(int) - np.stack(to_images(expected)).astype(int)
    assert np.abs(difference).max() <= 1

    settings = {"steps": 3, "init_image": found[0], "strength": 0.7, "auxiliary_weights": "base", "agg_time": 0.9}
    both = pipeline(["a V* on the beach", "a V* in the snow"], 2, batch_size=3, **settings)
    (alone,) = pipeline("a V* in the snow", **settings)
    assert len(both) == 4
    assert np.abs(np.asarray(both[2]).astype(int) - np.asarray(alone)).max() <= 2
    plain = pipeline("a V* in the snow", dci=False, **settings)
    assert np.abs(np.asarray(plain[0]).astype(int) - np.asarray(alone)).max() > 2
