"""Shared fixtures: offline always, the embedded model, and the golden vectors' place."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
# One thread: the same rounding on every machine, and some tests fork, which OpenMP's threads do not survive.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import ROOT, learned_concept


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=str(ROOT / "tests/golden/golden_public"), help="path stem of the golden vectors to replay"
    )


def pytest_collection_modifyitems(config, items):
    """Full-size models are for those who ask for them; other expressions of -m leave them out."""
    # Files are shared among processes in this order: Slurm's, which mostly wait, then those with long tests, so that
    # no process has a long one left at the end.
    long: dict = {}
    for item in items:
        rank = 0 if item.get_closest_marker("slurm") else 1 if item.get_closest_marker("slow") else 2
        long[item.path] = min(rank, long.get(item.path, 2))
    items.sort(key=lambda item: long[item.path])
    # The processes that share the tests must know them by the same names.
    assert not [item.nodeid for item in items if " at 0x" in item.nodeid]
    if "fullsize" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("fullsize")])
        items[:] = [item for item in items if not item.get_closest_marker("fullsize")]


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


@pytest.fixture(scope="session")
def finetuned(tiny_base):
    """A model with a concept that differs from its base, and the concept."""
    import copy

    model = copy.deepcopy(tiny_base)
    return model, learned_concept(model, "cat", 0.02)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_here():
    """See `apart` in tests/helpers.py: a later test in this process would fail, and only on some machines."""
    yield
    compiler = sys.modules.get("torch._dynamo.utils")
    compiled = sys.platform == "linux" and compiler is not None and bool(compiler.compilation_time_metrics)
    if compiled:
        compiler.compilation_time_metrics.clear()  # said once, of the test that did it
    assert not compiled, "expected `@apart`"
