"""Working through the cells of a grid: programs one after the other, a log and a result for each cell.

Everything that is known about a cell is in its files, so any number of processes on any number of
machines with a common disk can work on a grid, and any of them can be killed.
"""

import ctypes
import datetime
import fcntl
import fnmatch
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dci.files import write_atomically
from dci.grid import Cell, Training
from ldm.errors import UserError

_ERROR = "failed: "  # begins a log's line on why the cell failed
_DONE, _RUNNING, _FAILED, _QUEUED, _WAITING = STATES = ("done", "running", "failed", "queued", "waiting")


class CellFailed(Exception):
    """A program of a cell ended with an error; the message is the last line of its log."""


class Worker:
    """Works through cells, one program at a time.

    Args:
        threads: OMP_NUM_THREADS of the programs.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.program: subprocess.Popen | None = None

    def work(self, cells: list[Cell]) -> dict[str, str]:
        """Train, sample and evaluate what is not done; a failure does not keep the other cells back.

        Returns:
            Why cells failed, by their names.
        """
        failures, untrained = {}, {}
        for cell in cells:
            with _locked(cell.folder):
                if cell.result.is_file():
                    continue
                try:
                    if cell.training.name in untrained:
                        raise CellFailed(untrained[cell.training.name])
                    self._train(cell, untrained)
                    self._run(cell.sampling, cell.log)
                    self._run(cell.evaluation, cell.log)
                    _finish(cell)
                except (CellFailed, UserError, OSError) as error:
                    failures[cell.name] = str(error)
                    _note(cell.log, f"{_ERROR}{error}")
        return failures

    def stop(self) -> None:
        """Let the running program write a checkpoint and end; may be called by a signal's handler."""
        if self.program is not None and self.program.returncode is None:
            self.program.send_signal(signal.SIGUSR1)
            # Popen.wait would wait for the lock of the Popen.wait that the signal has interrupted.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.program.pid, os.WEXITED | os.WNOWAIT)

    def _train(self, cell: Cell, untrained: dict[str, str]) -> None:
        training = cell.training
        _claim(cell.folder, cell.recipe)
        with _locked(training.folder):
            _claim(training.folder, training.recipe)
            if training.concept_file.is_file():
                return
            _note(cell.log, f"training in {training.folder}")
            try:
                self._run(training.command, training.folder / "log.txt")
            except CellFailed as error:
                untrained[training.name] = str(error)
                raise
            _link_concept(training)

    def _run(self, command: tuple[str, ...], log: Path) -> None:
        """Run a program to its end, with its words in a log.

        Raises:
            CellFailed: it ended with an error.
        """
        _note(log, "$ " + " ".join(command))
        with open(log, "ab") as file:
            self.program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                            env=_environment(self.threads), preexec_fn=_before_program)  # fmt: skip
            code = self.program.wait()
        if code < 0:
            _note(log, f"{Path(command[1]).name} was ended by {signal.Signals(-code).name}")
        if code:
            raise CellFailed(_last_line(log))


def state(cell: Cell, queued: set[str] = frozenset()) -> str:
    """Return done, running, failed (begun, but nobody is at it), queued or waiting.

    Args:
        queued: names of trainings that a batch system is going to work on, or is working on.
    """
    if cell.result.is_file():
        return _DONE
    if _is_locked(cell.folder):
        return _RUNNING
    if cell.training.name in queued:
        return _QUEUED
    return _FAILED if cell.log.is_file() else _WAITING


def last_words(cell: Cell) -> str:
    """Return the last line of a failed cell's log; of a worker that was killed, how far its program had come."""
    if not cell.log.is_file():
        return "not begun"
    last = _last_line(cell.log)
    if _ERROR in last:
        return last.partition(_ERROR)[2]
    training = cell.training.folder / "log.txt"
    if training.is_file() and not cell.training.concept_file.is_file():
        last = _last_line(training)
    return f"the worker was killed; before: {last}"


def chosen(cells: list[Cell], pattern: str | None) -> list[Cell]:
    """Return the cells whose names fit a pattern such as cat/*/0/*; all of them without one.

    Raises:
        UserError: there are none.
    """
    found = [cell for cell in cells if pattern is None or fnmatch.fnmatchcase(cell.name, pattern)]
    if not found:
        raise UserError(f"no cell is called '{pattern}': --status shows their names, such as {cells[0].name}")
    return found


def check_recipes(cells: list[Cell]) -> None:
    """Raise UserError for a cell that was begun with other options."""
    for cell in cells:
        _check_recipe(cell.folder, cell.recipe)
        _check_recipe(cell.training.folder, cell.training.recipe)


def _last_line(log: Path) -> str:
    """The last line that is not empty; of a progress bar, what it showed last."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was logged")


def _finish(cell: Cell) -> None:
    """Write the result, which makes the cell done: its place in the grid, and scores as `Scores.load` reads them."""
    file = cell.folder / "evaluation" / "scores.json"
    try:
        (scores,) = json.loads(file.read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellFailed(f"{file} holds no scores although evaluation ended well") from error
    place = {"concept": cell.concept, "method": cell.method, "seed": cell.seed, "setting": cell.setting}
    write_atomically(cell.result, json.dumps(place | scores, indent=1).encode())


def _link_concept(training: Training) -> None:
    """Link the newest finished run's concept file to where the cells look for it."""
    files = sorted(training.folder.glob("*/concept.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise CellFailed(f"{training.folder} holds no concept file although training ended well")
    beside = training.folder / ".concept.tmp"
    beside.unlink(missing_ok=True)
    beside.symlink_to(files[-1].relative_to(training.folder))
    beside.replace(training.concept_file)


def _environment(threads: int) -> dict[str, str]:
    """The programs see one machine, not the batch system: they start processes for several devices themselves."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    return kept | {"OMP_NUM_THREADS": str(threads)}


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Let the system kill this process when the process that started it has died (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _before_program() -> None:
    """A program shall not outlive a worker that is killed, nor die of the signal that is meant for the worker."""
    end_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, waiting for it; the system gives it back however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_locked(folder: Path) -> bool:
    if not (folder / ".lock").is_file():
        return False
    with open(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Note what a folder's content is made of."""
    _check_recipe(folder, recipe)
    write_atomically(folder / "recipe.json", json.dumps(recipe, indent=2).encode())


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    file = folder / "recipe.json"
    if file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(recipe)):
        raise UserError(f"{folder} was begun with other options (they are in its recipe.json): "
                        "give another name=, or remove that folder")  # fmt: skip


def _note(log: Path, text: str) -> None:
    with open(log, "a") as file:
        file.write(f"[{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] {text}\n")
