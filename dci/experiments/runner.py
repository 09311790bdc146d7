"""Work through the points of a grid: one process after the other, a log and a result for each point.

Everything that is known about a point is in its files, so any number of workers on any number of
machines with a common disk can work on a grid, and any of them can be killed.
"""

import datetime
import fnmatch
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

import dci
from dci.experiments.cell import end_with_parent
from dci.experiments.grid import GridPoint
from dci.files import folder_lock, write_atomically
from dci.samples.metadata import first_difference, normal_form
from ldm.errors import UserError
from ldm.texts import readable, shell_words

_ERROR = "failed: "  # begins a log's line on why the point failed
_DONE, _RUNNING, _FAILED, _QUEUED, _WAITING = STATES = ("done", "running", "failed", "queued", "waiting")
PACKAGES = Path(dci.__file__).resolve().parent.parent
"""The folder that the processes of a grid import this project from."""


class PointFailed(Exception):
    """A process of a point ended with an error; the message is the last line of its log."""


class PointBusy(Exception):
    """Another worker, of this launcher or of another, has the point."""


class Worker:
    """Works through points, one process at a time.

    Args:
        threads: OMP_NUM_THREADS of the processes.
        gpu: CUDA's number of the device that they see; None: as this process.
    """

    def __init__(self, threads: int, gpu: int | None = None):
        self.threads, self.gpu = threads, gpu
        self.process: subprocess.Popen | None = None
        self.stopped = False

    def work(self, points: list[GridPoint], wait: bool = True) -> dict[str, str]:
        """Train, sample and score what is not done; a failure does not keep the other points back.

        Args:
            wait: for another worker that has the first point; what is begun is waited for in any case.

        Returns:
            Why points failed, by their names.

        Raises:
            PointBusy: another worker has the first point, and is not to be waited for.
        """
        failures: dict[str, str] = {}
        untrained: dict[str, str] = {}
        for number, point in enumerate(points):
            with _locked(point.folder, wait=wait or number > 0):
                if point.result.is_file():
                    continue
                try:
                    if point.training.name in untrained:
                        raise PointFailed(untrained[point.training.name])
                    self._train(point, untrained)
                    self._run(point.command, point.log)
                    if not point.result.is_file():
                        raise PointFailed(f"{point.result} is not there although scoring ended well")
                except (PointFailed, UserError, OSError) as error:
                    failures[point.name] = str(error)
                    _note(point.log, f"{_ERROR}{error}")
        return failures

    def stop(self) -> None:
        """Let the running process write a checkpoint and end, and start none; a signal's handler may call it."""
        self.stopped = True
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(getattr(signal, "SIGUSR1", signal.SIGTERM))
            # Popen.wait would wait for the lock of the Popen.wait that the signal has interrupted.
            with suppress(ChildProcessError, AttributeError):  # Windows has no waitid, and ends it at once
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def _train(self, point: GridPoint, untrained: dict[str, str]) -> None:
        training = point.training
        _begin(point.folder, point.recipe)
        with _locked(training.folder):
            _begin(training.folder, training.recipe)
            if training.concept_file.is_file():
                return
            _note(point.log, f"training in {training.folder}")
            try:
                self._run(training.command, training.folder / "log.txt")
                if not training.concept_file.is_file():
                    raise PointFailed(f"{training.folder} holds no concept file although training ended well")
            except PointFailed as error:
                untrained[training.name] = str(error)
                raise

    def _run(self, command: tuple[str, ...], log: Path) -> None:
        """Run a process to its end, with its words in a log.

        Raises:
            PointFailed: it ended with an error, or this worker was stopped.
        """
        _note(log, f"$ {shell_words(command)}")
        with open(log, "ab") as file:
            if self.stopped:
                raise PointFailed("the worker was stopped")
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(self.threads, self.gpu),
                preexec_fn=_before_process if hasattr(os, "fork") else None,
            )
            if self.stopped:  # meanwhile, by a signal that did not know the process yet
                self.stop()
            code = self.process.wait()
        if code < 0:
            _note(log, f"{command[3] if len(command) > 3 else command[0]} was ended by {signal.Signals(-code).name}")
        if code:
            raise PointFailed(_last_line(log))


def state(point: GridPoint, queued: Set[str] = frozenset()) -> str:
    """Return done, running, failed (begun, but no process works on it), queued or waiting.

    Args:
        queued: names of trainings that a batch system is going to work on, or is working on.
    """
    if point.result.is_file():
        return _DONE
    if _is_locked(point.folder):
        return _RUNNING
    if point.training.name in queued:
        return _QUEUED
    return _FAILED if point.log.is_file() else _WAITING


def last_words(point: GridPoint) -> str:
    """Return the last line of a failed point's log; of a worker that was killed, how far its process had come."""
    if not point.log.is_file():
        return "not begun"
    last = _last_line(point.log)
    if _ERROR in last:
        return last.partition(_ERROR)[2]
    training = point.training.folder / "log.txt"
    if training.is_file() and not point.training.concept_file.is_file():
        last = _last_line(training)
    return f"the worker was killed; before: {last}"


def chosen(points: list[GridPoint], patterns: Sequence[str]) -> list[GridPoint]:
    """Return the points whose names fit one of the patterns, such as cat/*/0/*; all of them without any.

    Raises:
        UserError: a pattern fits none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(point.name, pattern) for point in points):
            raise UserError(f"no cell is called '{pattern}': expected a name such as {points[0].name}, * for any part")
    return [p for p in points if not patterns or any(fnmatch.fnmatchcase(p.name, pattern) for pattern in patterns)]


def check_recipes(points: list[GridPoint]) -> None:
    """Raise UserError for a point that was begun with other options."""
    for point in points:
        _check_recipe(point.folder, point.recipe)
        _check_recipe(point.training.folder, point.training.recipe)


def _last_line(log: Path) -> str:
    """The last line that is not empty; of a progress bar, what it showed last."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was logged")


def _environment(threads: int, gpu: int | None) -> dict[str, str]:
    """The processes see one machine, not the batch system: they start others for several devices themselves."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    if gpu is not None:
        kept["CUDA_VISIBLE_DEVICES"] = str(gpu)
    paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _before_process() -> None:
    """A process shall not outlive a worker that is killed, nor die of the signal that is meant for the worker."""
    end_with_parent()
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder's lock, which may mean waiting for it; the system gives it back however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = folder_lock(folder).acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise PointBusy(str(folder)) from error
    with held:
        yield


def is_busy(points: list[GridPoint]) -> bool:
    """Return whether a worker has one of the points."""
    return any(_is_locked(point.folder) for point in points)


def _is_locked(folder: Path) -> bool:
    if not (folder / ".lock").is_file():
        return False
    try:
        with folder_lock(folder).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def _begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Note what a folder's content is made of."""
    _check_recipe(folder, recipe)
    write_atomically(folder / "recipe.json", json.dumps(normal_form(recipe), indent=2).encode())


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    file = folder / "recipe.json"
    if not file.is_file():
        return
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON ({error}): remove {folder}") from error
    if found := first_difference(begun, recipe):
        raise UserError(f"{folder} was begun with other options: {found}; give another name=, or remove that folder")


def _note(log: Path, text: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(readable(f"[{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] {text}\n"))
