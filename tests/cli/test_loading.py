"""A concept that was trained with an autoencoder in place of its model's own is sampled with it, on every road."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, refused, run_here, run_main
from safetensors.torch import load_file, save_file

from dci.cli.loading import base_vae
from dci.concept.trained_on import TrainedOn
from dci.experiments import cell
from dci.experiments.sampling import SamplingConfig
from dci.files import content_hash
from dci.pipeline import Pipeline
from ldm.checkpoint import load_model, surroundings_digest
from ldm.errors import UserError
from ldm.formats.separate_vae import PREFIX

TINY = str(ROOT / "configs/model/tiny.yaml")
BIAS = "decoder.conv_out.bias"


@pytest.fixture
def trained(finetuned, tiny_base, tmp_path):
    """A concept's file, the autoencoder that its configuration names, and another one."""
    files = [tmp_path / "trained.safetensors", tmp_path / "other.safetensors"]
    for file, shift in zip(files, (0.25, 0.5), strict=True):
        state = {name: weight.clone() for name, weight in tiny_base.autoencoder.state_dict().items()}
        state[BIAS] += shift
        save_file(state, file)
    concept = dataclasses.replace(finetuned[1], config={"model": TINY, "vae": str(files[0])})
    concept.save(tmp_path / "concept.safetensors")
    return tmp_path / "concept.safetensors", *map(str, files)


def cells_model(file, options):
    from dci.concept.concept_file import Concept

    return cell._load_model(SamplingConfig(**options), Concept.load(file), "cpu")[0]


def bias(model):
    return dict(model.autoencoder.state_dict())[BIAS]


@pytest.mark.slow
@pytest.mark.parametrize("load", [lambda file, options: Pipeline.load(file, device="cpu", **options).model, cells_model])
def test_the_trained_autoencoder_comes_with_the_model(trained, tiny_base, load):
    file, own, _ = trained
    own_bias = load_file(own)[BIAS]
    torch.testing.assert_close(bias(load(file, {})), own_bias)
    torch.testing.assert_close(bias(load(file, {"model": TINY})), bias(tiny_base))


def test_another_autoencoder_goes_before_it(trained):
    file, own, other = trained
    torch.testing.assert_close(bias(Pipeline.load(file, device="cpu", vae=other).model), load_file(other)[BIAS])
    config = TrainedOn(TINY, vae=own)
    asked = [(None, None, None), (other, None, None), (None, TINY, None), (other, TINY, None), (None, None, "weights.ckpt")]
    found = [base_vae(argparse.Namespace(vae=vae, model=model, checkpoint=file), config) for vae, model, file in asked]
    assert found == [own, other, None, other, own]
    assert base_vae(argparse.Namespace(vae=None, model=None, checkpoint=None), TrainedOn("/gone", vae=own)) is None


def test_images_record_its_content(trained, tmp_path):
    file, own, _ = trained
    small = ("--steps", 1, "--n-samples", 1, "--no-dci", "--device", "cpu")
    run_main("sample_dci.py", "--concept", file, "--prompt", "a V* cat", "--outdir", tmp_path / "out", *small)
    metadata = json.loads((tmp_path / "out/prompts.json").read_text())["00000"]
    assert (metadata["vae"], metadata["vae_hash"]) == (own, content_hash(own))


def test_a_missing_one_is_said_and_not_replaced(trained, tmp_path, capfd):
    file, own, _ = trained
    (tmp_path / "trained.safetensors").unlink()
    with pytest.raises(UserError, match="autoencoder .*trained.safetensors .* is not there: name it as vae="):
        Pipeline.load(file, device="cpu")
    result = run_here(capfd, "sample_dci.py", "--concept", file, "--prompt", "a V* cat", "--outdir", tmp_path / "out")
    refused(result, own, "name it as --vae, or name the model as --model")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["relative", "absolute", "folder"])
def test_a_models_own_configuration_names_one(trained, tmp_path, place):
    """Relative to the configuration's project, as its checkpoint is; what is asked for goes before it."""
    _, own, other = trained
    (tmp_path / "configs").mkdir()
    config, lone = tmp_path / "configs/m.yaml", tmp_path / "lone"
    content = yaml.safe_load(Path(TINY).read_text()) | {"checkpoint": str(ROOT / "data/tiny")}
    lone.mkdir()
    (lone / "diffusion_pytorch_model.safetensors").write_bytes(Path(own).read_bytes())
    given = {"relative": "trained.safetensors", "absolute": own, "folder": str(lone)}[place]
    config.write_text(yaml.safe_dump(content | {"vae": given}))
    plain, model = load_model(TINY), load_model(config)
    torch.testing.assert_close(bias(model), load_file(own)[BIAS])
    torch.testing.assert_close(bias(load_model(config, ROOT / "data/tiny")), load_file(own)[BIAS])
    torch.testing.assert_close(bias(load_model(config, vae=other)), load_file(other)[BIAS])
    # Training tells it from the model's own by what it holds, and by nothing else.
    assert surroundings_digest(model) == surroundings_digest(load_model(TINY, vae=own)) != surroundings_digest(plain)
    config.write_text(yaml.safe_dump(content | {"vae": "gone.safetensors"}))
    with pytest.raises(UserError, match="gone.safetensors"):
        load_model(config)


@pytest.mark.slow
def test_only_a_whole_model_is_exported_with_an_autoencoder(trained, tmp_path, capfd):
    file, own, other = trained
    refused(run_here(capfd, "export_concept.py", file, "--to", "lora", "--vae", other), "--vae is for --to checkpoint")
    for name, given, expected in (("own", [], own), ("given", ["--vae", other], other)):
        run_main("export_concept.py", file, "--to", "checkpoint", "--out", tmp_path / name, *given)
        whole = max((tmp_path / name).glob("*.safetensors"), key=lambda file: file.stat().st_size)  # tokens lie beside
        torch.testing.assert_close(load_file(whole)[PREFIX + BIAS], load_file(expected)[BIAS].half())
