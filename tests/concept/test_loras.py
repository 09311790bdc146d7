"""LoRAs on the base model, in training and in sampling: put on once, found again, and what of them has no effect is said."""

import copy
import dataclasses
import shutil
import warnings

import numpy as np
import pytest
import torch
from foreign_models import concept_of, lora_concept
from helpers import ROOT, pixels, refused, run_here, run_main
from safetensors.torch import load_file

from dci.concept.concept_file import Concept
from dci.concept.foreign.export import export
from dci.concept.foreign.layers import Layers
from dci.pipeline import Pipeline
from ldm.errors import Note, UserError

TINY = str(ROOT / "configs/model/tiny.yaml")
STRENGTH = 0.7


@pytest.fixture(scope="module")
def style(tiny_base, tmp_path_factory):
    """A LoRA of the embedded model, with an embedding inside."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("style")
    concept = lora_concept(tiny_base, parts=("attn1.to_q", "attn2.to_k", "conv1"))
    export(concept, tiny_base, "lora", folder, ["mystyle"], bundle=True)
    return folder / "mystyle-lora.safetensors"


@pytest.fixture(scope="module")
def trained(style, tmp_path_factory):
    """A concept that was trained on the base model with the LoRA on it."""
    logs = tmp_path_factory.mktemp("logs")
    options = ("--logdir", logs, "--device", "cpu", "--lora", f"{style}:{STRENGTH}", "logging.tensorboard=false")
    training = ("training.steps=2", "training.batch_size=2", "training.learning_rate=1e-3", "validation.every=0")
    run_main("train_ico.py", "--config", ROOT / "configs/train/ico-tiny.yaml", *options, *training)
    (run,) = logs.iterdir()
    return run / "concept.safetensors"


def images(pipeline, **options):
    return np.stack([np.asarray(image) for image in pipeline("a V* cat", 2, steps=3, **options)])


def load(concept, **options):
    """A pipeline, and what was said in loading."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", Note)
        pipeline = Pipeline.load(concept, device="cpu", **options)
    return pipeline, [str(note.message) for note in said if note.category is Note]


@torch.no_grad()
def with_style(model, style, strength):
    """A model with a LoRA in its weights, by kohya's rule."""
    model, tensors = copy.deepcopy(model), load_file(style)
    parameters = dict(model.named_parameters())
    for kohya, place in Layers.of(model.config).kohya.items():
        if f"{kohya}.alpha" in tensors:
            down, up = (tensors[f"{kohya}.lora_{part}.weight"].float() for part in ("down", "up"))
            change = tensors[f"{kohya}.alpha"] / len(down) * (up.flatten(1) @ down.flatten(1))
            parameters[place.weight] += strength * change.view(parameters[place.weight].shape)
    return model


@pytest.mark.slow
def test_a_concept_trained_on_loras_is_sampled_on_them(trained, style, tiny_base):
    concept = Concept.load(trained)
    assert concept.config["loras"] == [f"{style}:{STRENGTH}"]
    pipeline, _ = load(trained)
    free = dataclasses.replace(concept, base="")  # not checked: the model is put together here
    expected = images(Pipeline.of(with_style(tiny_base, style, STRENGTH), free))
    assert np.abs(images(pipeline).astype(int) - expected).max() <= 1
    assert np.abs(images(Pipeline.of(copy.deepcopy(tiny_base), free)).astype(int) - expected).max() > 20


@pytest.mark.slow
def test_naming_them_again_changes_nothing(trained, style, tmp_path):
    plain, said = load(trained)
    again, more = load(trained, loras=[f"{style}:{STRENGTH}"])
    assert np.array_equal(images(plain), images(again))
    assert "is on the base model already, with strength 0.7: the concept was trained on it" in " ".join(more)
    assert "already" not in " ".join(said)
    command = ("sample_dci.py", "--concept", trained, "--prompt", "a V* cat", "--steps", 2, "--n-samples", 1)
    with pytest.warns(Note, match="on the base model already"):
        for name, more in (("a", ()), ("b", ("--lora", f"{style}:{STRENGTH}"))):
            run_main(*command, "--device", "cpu", "--outdir", tmp_path / name, *more)
    assert np.array_equal(*(pixels(tmp_path / name / "samples/00000.png") for name in "ab"))


@pytest.mark.slow
def test_another_strength_takes_the_place_of_trainings(trained, style, tiny_base):
    pipeline, _ = load(trained, loras=[f"{style}:0.2"])
    whole, base = Concept.load(trained).weights(with_style(tiny_base, style, STRENGTH)), with_style(tiny_base, style, 0.2)
    trained_on = with_style(tiny_base, style, STRENGTH).state_dict()
    for name, weight in pipeline.model.named_parameters():
        expected = base.state_dict()[name] + (whole[name] - trained_on[name] if name in whole else 0)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_that_is_not_there_any_more_is_asked_for(trained, style, tmp_path, capfd):
    concept = Concept.load(trained)
    gone = dataclasses.replace(concept, config=concept.config | {"loras": [f"/gone/{style.name}:{STRENGTH}"]})
    gone.save(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=f"the LoRA /gone/{style.name} that this concept was trained on is not there"):
        Pipeline.load(tmp_path / "gone.safetensors", device="cpu")
    result = run_here(capfd, "sample_dci.py", "--concept", tmp_path / "gone.safetensors", "--prompt", "a V* cat")
    assert "sampling also takes it from --lora where it is now" in result.stderr
    moved = shutil.copy(style, tmp_path / style.name)
    found, _ = load(tmp_path / "gone.safetensors", loras=[str(moved)])
    assert np.array_equal(images(found), images(load(trained)[0]))
    refused(run_here(capfd, "export_concept.py", tmp_path / "gone.safetensors", "--to", "lora"), "put it back")


@pytest.mark.slow
def test_a_run_on_loras_goes_on_with_them(trained, tmp_path):
    """What a checkpoint was trained on is the model with the LoRA: resuming looks for it."""
    run = shutil.copytree(trained.parent, tmp_path / trained.parent.name)
    run_main("train_ico.py", "--resume", run, "--device", "cpu", "training.steps=3")
    assert Concept.load(run / trained.name).config["training"]["steps"] == 3


@pytest.mark.slow
def test_the_card_names_them(trained, style, tmp_path):
    run_main("export_concept.py", trained, "--to", "lora", "--out", tmp_path)
    assert f"`{style}:{STRENGTH}`" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_embeddings_inside_have_no_effect_and_that_is_said(style, finetuned, tmp_path):
    finetuned[1].save(tmp_path / "c.safetensors")
    pipeline, said = load(tmp_path / "c.safetensors", model=TINY, loras=[str(style)])
    assert "brings embeddings too (mystyle), which have no effect here" in " ".join(said)


@pytest.mark.slow
def test_a_lora_without_embeddings_is_put_on_in_silence(tiny_base, finetuned, tmp_path):
    finetuned[1].save(tmp_path / "c.safetensors")
    export(concept_of(tiny_base), tiny_base, "lora", tmp_path)
    assert not load(tmp_path / "c.safetensors", model=TINY, loras=[str(tmp_path / "mycat-lora.safetensors")])[1]
