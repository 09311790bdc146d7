"""Fine-tuning at Stable Diffusion's size, with random weights.

python -m pytest -m fullsize tests/finetuning/test_fullsize_training.py        (about six minutes on two cores, 8 GiB)
"""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from dci.concept.concept_file import Concept, LowRank
from dci.concept.modifier_tokens import ConceptName

FLOOR = 1699e9  # FLOPs of a step for a 512 px image: UNet forward, backward for K/V and context 1672, text 27

KEYS = (line.split(maxsplit=1) for line in (ROOT / "tests/data/sd-v1-keys.txt").read_text().splitlines())
KEYS_VALUES = {
    name: [int(side) for side in shape.strip("[]()").replace(",", " ").split()]
    for name, shape in KEYS
    if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
}


def concept(weights, low_rank):
    tokens, contexts = torch.randn(3, 768), torch.randn(20, 4, 768)
    names = (ConceptName(("<new1>", "<new2>", "<new3>"), "dog"),)
    return Concept(weights, tokens, contexts, contexts.clone(), names, "0" * 16, "sd-v1", {}, low_rank=low_rank)


def test_files_for_stable_diffusion_stay_small(tmp_path):
    assert len(KEYS_VALUES) == 32
    whole = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in KEYS_VALUES.items()}
    concept(whole, {}).save(tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").stat().st_size <= 40e6
    thin = {
        name: LowRank(torch.zeros(rows, 64).half(), torch.zeros(64, columns).half())
        for name, (rows, columns) in KEYS_VALUES.items()
    }
    concept({}, thin).save(tmp_path / "thin.safetensors")
    assert (tmp_path / "thin.safetensors").stat().st_size <= 10e6


def measure(*args):
    command = [sys.executable, str(ROOT / "benchmarks/train_settings.py"), "--model", "sd-v1", "--batch", "1", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.fullsize
def test_a_step_at_256_px_in_bf16_fits_in_16_gib():
    result = measure("--size", "256", "--steps", "1", "--only", "training.precision=bf16")
    assert len(result["seconds"]) == 1
    assert result["peak_gib"] <= 16


@pytest.mark.fullsize
def test_a_step_takes_hardly_more_flops_than_it_must():
    result = measure("--size", "512", "--steps", "0", "--flops", "--only", "training.precision=bf16")
    assert 0.9 * FLOOR < result["flops_per_image"] <= 1.05 * FLOOR
    assert result["flops_autoencoder"] == 0
