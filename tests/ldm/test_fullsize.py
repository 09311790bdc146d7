"""Stable Diffusion 1.5 and 2.1 at full size with random weights, in every format, against the libraries that made them.

python -m pytest -m fullsize     (minutes; about 12 GiB of memory and 12 GB of disk)
"""

import gc
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import tiny_models
import torch
from helpers import ROOT
from safetensors.torch import save_file

from ldm.checkpoint import fingerprint, load_model
from ldm.formats import presets

pytestmark = pytest.mark.fullsize

OFFICIAL = {"sd-v1": "v1-inference.yaml", "sd-v2-v": "v2-inference-v.yaml"}
HALF_LIMIT = 1.3  # peak memory of the whole process over the file's size


def save_ckpt(theirs, place):
    torch.save({"state_dict": tiny_models.published_extras(theirs.state), "global_step": 0}, place / "model.ckpt")
    return ROOT / "tests/data/official" / OFFICIAL[theirs.config.name], place / "model.ckpt"


def save_single(theirs, place):
    save_file({name: tensor.half().contiguous() for name, tensor in theirs.state.items()}, place / "m.safetensors")
    return place / "m.safetensors", None


def save_half_ckpt(theirs, place):
    torch.save({"state_dict": {name: tensor.half() for name, tensor in theirs.state.items()}}, place / "half.ckpt")
    return place / "half.ckpt", None


FORMATS = {
    ".ckpt fp16": save_half_ckpt,
    ".safetensors fp16": save_single,
    "diffusers folder fp16": lambda theirs, place: (tiny_models.save_folder(theirs, place / "folder", "fp16"), None),
    ".ckpt with the official YAML": save_ckpt,
    "diffusers folder, sharded": lambda theirs, place: (
        tiny_models.save_folder(theirs, place / "folder", shard="1GB"),
        None,
    ),
    "diffusers folder": lambda theirs, place: (tiny_models.save_folder(theirs, place / "folder"), None),
}


def measured(name, place):
    """Time and peak memory of loading in fp16 in a process of its own, and the size of the files."""
    command = [sys.executable, str(ROOT / "benchmarks/measure_load.py"), str(name), "fp16"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    files = (f for f in place.rglob("*") if f.suffix in (".ckpt", ".safetensors", ".bin"))
    result["file_bytes"] = sum(f.stat().st_size for f in files)
    return result


@torch.no_grad()
@pytest.mark.parametrize("config", [presets.sd_v1(), presets.sd_v2("v")], ids=lambda config: config.name)
def test_every_format_equals_the_libraries_at_full_size(config, tmp_path):
    theirs = tiny_models.make(config)
    expected = tiny_models.Expected(theirs, side=32)
    known = None
    for name, save in FORMATS.items():
        place = tmp_path / "files"
        place.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a 2.x file does not say what its UNet predicts
            path, checkpoint = save(theirs, place)
            model = load_model(path, checkpoint)
        assert model.config == config
        known = known or fingerprint(model)
        assert fingerprint(model) == known
        errors = expected.errors(model)
        assert max(errors.values()) <= 1e-5, (name, errors)
        del model
        gc.collect()
        result = measured(path, place) if "fp16" in name else {}
        shutil.rmtree(place)
        print(json.dumps({"model": config.name, "format": name, **result, "errors": errors}), flush=True)
        if result:
            assert result["peak_bytes"] <= HALF_LIMIT * result["file_bytes"], (name, result)
