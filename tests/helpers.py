"""What tests share: where the files lie, the programs as a user runs them, what a refusal looks like."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(script, *args, cwd=ROOT):
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


def run_main(script, *args):
    """Run a program within this process, which spares the imports."""
    command = [str(ROOT / "scripts" / script), *map(str, args)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.syspath_prepend(str(ROOT / "scripts"))
        runpy.run_path(command[0], run_name="__main__")


def run_here(capfd, script, *args):
    """Run a program that will be refused within this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(script, *args)
    return subprocess.CompletedProcess(args, stop.value.code, *capfd.readouterr())


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def refused(result, *words):
    """The program left with exit code 2 and one line that holds the words."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0]


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def sample_images(model, concept, prompts, indices, options, dual=None, callback=None, maps=None, **more):
    """Pixels of a batch; `more` are fields of `SampleRequest`."""
    from dci.dual_branch.sampling import Observers, SampleRequest, sample

    return sample(model, concept, SampleRequest(prompts, indices, options, dual, **more), Observers(callback, maps))
