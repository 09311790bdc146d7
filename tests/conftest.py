"""Shared fixtures: offline always, the embedded model, and the golden vectors' place."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=str(ROOT / "tests/golden/golden_public"), help="path stem of the golden vectors to replay"
    )


@pytest.fixture(scope="session")
def tiny_base():
    """The embedded model; read-only, copy it before changing it."""
    from ldm.checkpoint import load_model

    return load_model(ROOT / "configs/model/tiny.yaml")


@pytest.fixture
def tiny(tiny_base):
    """A fresh copy of the embedded model."""
    import copy

    return copy.deepcopy(tiny_base)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
