"""Systems without fcntl, SIGUSR1, prctl and the like: everything imports, and locks still lock."""

import ctypes
import multiprocessing
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, POSIX, ROOT

from dci.experiments.cell import end_with_parent
from dci.samples import file_locks

CODE = """
import ctypes, importlib, os, pkgutil, signal, sys
# What we build on comes first: it sees the system as it is.
for name in ("torch", "torchvision", "pytorch_lightning", "transformers", "open_clip", "filelock", "matplotlib.figure",
             "submitit", "tqdm", "timm", "pytorch_lightning.loggers", "multiprocessing.connection", "pillow_heif",
             "gradio", "diffusers"):
    importlib.import_module(name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD"):
    delattr(signal, name)
for name in ("fork", "sched_getaffinity", "waitid", "setsid", "geteuid", "O_DIRECTORY"):
    delattr(os, name)
def no_library(*args, **options):
    raise TypeError("no such library")
ctypes.CDLL = no_library
import dci, ldm, benchmarks
packages = (dci, ldm, benchmarks)
names = [module.name for p in packages for module in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if not any(part in name for part in ("triton", "peers")):  # need what the other tests look for
        importlib.import_module(name)
print(len(names))
from dci.experiments.cell import end_with_parent
from dci.finetuning.signals import GracefulStop
end_with_parent()
with GracefulStop() as stop:
    assert stop.number == 0
from dci.files import write_atomically
write_atomically(sys.argv[1], b"whole")
"""


@pytest.mark.slow
def test_every_module_imports_without_what_other_systems_lack(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "file")],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("system", ["fcntl", "none"])
@POSIX
def test_locks_are_exclusive_until_their_process_ends(tmp_path, monkeypatch, system):
    if system == "none":
        monkeypatch.setattr(file_locks, "fcntl", None)

    def hold(ready, end):
        locks = file_locks.FileLocks(tmp_path / "locks")
        assert locks.acquire(range(4, 8))
        ready.set()
        end.wait()

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(ready, end))
    other.start()
    ready.wait()
    locks = file_locks.FileLocks(tmp_path / "locks")
    assert locks.acquire(range(0, 4))
    assert not locks.acquire(range(6, 10))
    assert locks.acquire(range(8, 10))  # what was refused holds nothing back
    with locks.exclusive():
        pass
    locks.release(range(8, 10))
    other.kill()
    other.join()
    assert locks.acquire(range(6, 10))
    locks.close()


def test_a_system_without_prctl_is_no_error(monkeypatch):
    def nothing(*_):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    end_with_parent()
