"""What tests share: where the files lie, the programs as a user runs them, what a refusal looks like."""

import functools
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests/stored"
SHARED = ROOT.parent / "shared"
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals, a shell or symbolic links")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SKIPPED = 77  # the exit code that test programs leave with, after Automake
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def mostly_slow(values, *quick):
    """A test's parameters, with all but the named ones marked slow: a kind has its quick check, and all of it one."""
    values = list(values)
    assert all(value in values for value in quick), f"expected some of {values}"
    return [
        value if value in quick else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)
        for value in values
    ]


def run_alone(script, *args, cwd=ROOT):
    """Run a program in an interpreter of its own, whose imports take seconds."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


def run(script, *args, cwd=ROOT):
    """Run a program in a process of its own that begins with what this one has imported."""
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return run_alone(script, *args, cwd=cwd)
    return forked(lambda: run_main(script, *args), cwd)


def apart(test):
    """Run a test in a forked process. Compiling starts threads of autograd, after which no process forked from this one
    can train: `run` could no longer start programs here.
    """

    @functools.wraps(test)
    def in_a_process(*args, **kwargs):
        if sys.platform != "linux":
            test(*args, **kwargs)
            return
        code = exit_code(lambda: outcome(lambda: test(*args, **kwargs)))
        if code == SKIPPED:
            pytest.skip("in a process of its own")
        assert code == 0, "failed in a process of its own, see its messages"

    return in_a_process


def outcome(test):
    """Call a test; return the exit code that says what came of it."""
    try:
        test()
    except pytest.skip.Exception:
        return SKIPPED
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def exit_code(call):
    """Call a function in a forked process that leaves with what it returns; return that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, on threads: those of progress bars and loggers have nothing to do
        pid = os.fork()
    if pid == 0:
        os._exit(call())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(call, cwd=ROOT):
    """Call a function in a forked process, as a program's main is called; return what it printed, and its exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = exit_code(lambda: as_a_program(call, cwd, out.fileno(), err.fileno()))
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess([], code, *said)


def as_a_program(call, cwd, out, err):
    """Give a forked process a program's streams and signals, call; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", closefd=False) for n in range(3))
    os.chdir(cwd)
    os.environ |= ENVIRONMENT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # pytest collects warnings; a program prints them.
    warnings.showwarning = lambda *warning, **_: sys.stderr.write(warnings.formatwarning(*warning[:4]))
    code = 0
    try:
        call()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


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


def learned_concept(model, class_noun, change):
    """A concept as a training leaves it, N(0, change^2) away from the model, which has it applied."""
    import torch

    from dci.finetuning.config import ConceptConfig, FinetuneConfig
    from dci.finetuning.module import ICOTraining

    module = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun=class_noun)), images=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += change * torch.randn(parameter.shape, generator=generator)
    concept = module.concept()
    model.requires_grad_(False)
    return concept
