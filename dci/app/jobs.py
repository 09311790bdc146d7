"""Trainings in a queue of one: each is the training program in a process of its own, whether a page shows it or not."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dci.finetuning.callbacks import METRICS_FILE, read_metrics
from dci.finetuning.run_folder import CONCEPT_FILE, CONFIG_FILE
from ldm.errors import UserError
from ldm.shipped import program
from ldm.texts import shell_words

WAITING, RUNNING, STOPPED, FINISHED, FAILED = "waiting", "running", "stopped", "finished", "failed"
MOST_WAITING, MOST_KEPT = 3, 20
_PATIENCE = 120  # seconds that a training has for its step and its checkpoint when it is asked to stop


@dataclass
class Job:
    """One call of the training program."""

    number: int
    words: Sequence[str]  # its arguments
    name: str  # that the run folder's name ends with
    steps: int
    log: Path
    folder: Path | None = None  # the run folder, once it is there
    state: str = WAITING
    message: str = ""  # why it failed, in one line
    process: subprocess.Popen | None = field(default=None, repr=False)
    asked_to_stop: bool = False

    @property
    def command(self) -> str:
        """The command that does the same from a terminal."""
        return f"{program('train_ico.py', 'train')} {shell_words(self.words)}"


class Jobs:
    """The queue. It lives as long as the server, and so outlives every page and every browser.

    Args:
        logdir: where the run folders are.
        scratch: folder for what the programs print.
    """

    def __init__(self, logdir: Path, scratch: Path):
        self.logdir, self.scratch = logdir.absolute(), scratch
        self.jobs: list[Job] = []
        self._numbers, self._changed, self._closed = itertools.count(1), threading.Condition(), False
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def submit(self, words: Sequence[str], name: str, steps: int, folder: Path | None = None) -> Job:
        """Put a training behind those that wait.

        Args:
            words: arguments of the training program.
            folder: the run that it goes on with.

        Raises:
            UserError: too many wait already, or that run is at work.
        """
        with self._changed:
            if sum(job.state == WAITING for job in self.jobs) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} trainings wait already: let one of them end first")
            if folder is not None and any(job.folder == folder for job in self.jobs if job.state in (WAITING, RUNNING)):
                raise UserError(f"{folder.name} is being trained already")
            number = next(self._numbers)
            job = Job(number, words, name, steps, self.scratch / f"training-{number}.log", folder)
            self.jobs.append(job)
            ended = [old for old in self.jobs if old.state not in (WAITING, RUNNING)]
            for old in ended[: max(0, len(self.jobs) - MOST_KEPT)]:
                self.jobs.remove(old)
                old.log.unlink(missing_ok=True)
            self._changed.notify_all()
            return job

    def current(self) -> Job | None:
        """Return the job that runs, or else the newest one."""
        running = [job for job in self.jobs if job.state == RUNNING]
        shown = running or self.jobs
        return shown[-1] if shown else None

    def waiting(self) -> int:
        """How many trainings wait."""
        return sum(job.state == WAITING for job in self.jobs)

    def stop(self) -> None:
        """Ask the job that runs to write a checkpoint and end; with none, take the newest that waits out of the queue."""
        with self._changed:
            job = self.current()
            if job is not None and job.state == RUNNING:
                job.asked_to_stop = True
                _signal(job)
            elif job is not None and job.state == WAITING:
                job.state = STOPPED

    def resumable(self) -> list[Path]:
        """Return the runs that were begun, have a checkpoint, and are not finished or at work; the newest first."""
        busy = {job.folder for job in self.jobs if job.state in (WAITING, RUNNING)}
        found = sorted(self.logdir.glob(f"*/{CONFIG_FILE}"), reverse=True) if self.logdir.is_dir() else []
        folders = [file.parent.parent for file in found]
        return [
            f for f in folders if f not in busy and not (f / CONCEPT_FILE).exists() and any(f.glob("checkpoints/*.ckpt"))
        ]

    def close(self) -> None:
        """Stop the job that runs, and wait for its checkpoint."""
        with self._changed:
            self._closed = True
            for job in self.jobs:
                if job.state == WAITING:
                    job.state = STOPPED
            self._changed.notify_all()
        self.stop()
        self._worker.join(_PATIENCE)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self.waiting():
                    self._changed.wait()
                if self._closed:
                    return
                job = next(job for job in self.jobs if job.state == WAITING)
                before = set(self.logdir.glob(f"*_{job.name}*")) if self.logdir.is_dir() else set()
                job.process = _start(job)
                job.state = RUNNING
            while job.process.poll() is None:
                self._find_folder(job, before)
                try:
                    job.process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
            self._find_folder(job, before)
            with self._changed:
                job.state, job.message = _outcome(job)

    def _find_folder(self, job: Job, before: set[Path]) -> None:
        """Note the run folder, once the program has made it."""
        if job.folder is None:
            new = sorted(set(self.logdir.glob(f"*_{job.name}*")) - before)
            job.folder = new[0] if new else None


def losses(job: Job) -> list[tuple[int, float]]:
    """Return what metrics.csv has so far: (step, mean loss since the row before)."""
    if job.folder is None:
        return []
    try:
        return [(int(row[0]), float(row[1])) for row in read_metrics(job.folder / METRICS_FILE, job.steps)]
    except (OSError, ValueError, IndexError):
        return []


def validation_sheet(job: Job) -> Path | None:
    """Return the newest sheet of validation images."""
    return max(job.folder.glob("samples/step-*.png"), default=None) if job.folder else None


def _start(job: Job) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])  # the packages of the program that serves, whatever is installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with open(job.log, "wb") as log:
        command = [sys.executable, "-m", "dci", "train", *job.words]
        # A group of its own: Ctrl+C in the server's terminal is the server's affair.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _signal(job: Job) -> None:
    if job.process is not None and job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)


def _outcome(job: Job) -> tuple[str, str]:
    """State and message of a job whose process has ended."""
    code = job.process.returncode if job.process else -1
    if code == 0 and job.folder is not None and (job.folder / CONCEPT_FILE).is_file():
        return FINISHED, ""
    if job.asked_to_stop:
        return STOPPED, ""
    return FAILED, last_line(job.log) or f"the training program ended with code {code}"


def last_line(log: Path) -> str:
    """Return the last line that a program printed, without what progress bars leave."""
    try:
        text = log.read_bytes()[-20000:].decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip() and "step/s" not in line]
    found = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    return found.removeprefix("error: ")


def as_json(jobs: Jobs) -> str:
    """Return a text that changes whenever the tab has something new to show."""
    job = jobs.current()
    if job is None:
        return json.dumps([0, len(jobs.resumable())])
    sheet = validation_sheet(job)
    rows = losses(job)
    return json.dumps([job.number, job.state, rows[-1:], str(sheet), jobs.waiting(), str(job.folder), job.message])
