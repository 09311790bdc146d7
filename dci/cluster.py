"""Cells of a grid as jobs: of Slurm, or of one machine with a process for each device; both through submitit."""

import json
import os
import re
import shutil
import subprocess
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from dci.cells import Worker, end_with_parent, state
from dci.files import write_atomically
from dci.grid import ROOT, Cell, by_training, grid_folder
from dci.suites import SuiteConfig
from ldm.errors import UserError

LOCAL, SLURM = "local", "slurm"


@dataclass
class SweepConfig(SuiteConfig):
    """A grid, and where its cells are worked on; a suite of compare.py's is one too."""

    cluster: str = LOCAL  # local: processes on this machine; slurm: jobs in its queue
    workers: int | None = None  # local: processes at a time; null: one for each GPU, without any one for each core
    slurm: dict[str, Any] = field(default_factory=dict)  # a job's resources in place of SLURM_DEFAULTS


SLURM_DEFAULTS = {
    "time": 240,  # minutes; after that a job queues itself again
    "gpus_per_node": 1,
    "cpus_per_task": 2,
    "mem": "16GB",
    "signal_delay_s": 120,  # before the limit: write a checkpoint
    "array_parallelism": 256,  # jobs that may run at the same time
}
"""Resources of a job, under submitit's names; any other of sbatch's options goes into additional_parameters."""

_REQUEUES = 1000  # a job may reach its time limit so often
_POLL = 0.5  # seconds between looks at local jobs; Slurm is asked ten times less often


class Job:
    """What submitit runs in a worker process: cells that share a training."""

    def __init__(self, cells: list[Cell], threads: int):
        self.cells, self.threads = cells, threads
        self.worker: Worker | None = None

    def __call__(self) -> dict[str, str]:
        end_with_parent()
        self.worker = Worker(self.threads)
        return self.worker.work(self.cells)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before the time limit: end the running program; the job is queued again as it was."""
        self.worker.stop()
        return submitit.helpers.DelayedSubmission(Job(self.cells, self.threads))


def check(config: SweepConfig) -> None:
    """Raise UserError for options that no sweep could use."""
    if config.cluster not in (LOCAL, SLURM):
        raise UserError(f"cluster={config.cluster}: expected {LOCAL} or {SLURM}")


def run_local(config: SweepConfig, cells: list[Cell], say=print) -> None:
    """Work through cells on this machine and return when nothing is left to try.

    Args:
        say: told of each training whose cells have come to an end.
    """
    gpus = _gpus() if config.device in ("auto", "cuda") else []
    workers = config.workers or len(gpus) or len(os.sched_getaffinity(0))
    executor = submitit.LocalExecutor(_log_folder(config))
    waiting, free, running = by_training(cells), list(range(workers))[::-1], {}
    try:
        while waiting or running:
            while waiting and free:
                slot, group = free.pop(), waiting.pop(0)
                gpu = [gpus[slot % len(gpus)]] if gpus else []
                executor.update_parameters(timeout_min=10**7, gpus_per_node=len(gpu), visible_gpus=gpu)
                running[slot] = group, executor.submit(Job(group, config.threads))
            for slot, (group, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    free.append(slot)
                    _report(group, say)
            time.sleep(_POLL)
    finally:
        for _, job in running.values():  # the program was stopped
            job.cancel()


def submit_slurm(config: SweepConfig, cells: list[Cell]) -> int:
    """Put an array of jobs into Slurm's queue for those cells whose jobs are not in it yet.

    Returns:
        How many jobs were added.

    Raises:
        UserError: there is no Slurm here, or it does not take the jobs.
    """
    queued = queued_trainings(config)
    groups = [group for group in by_training(cells) if group[0].training.name not in queued]
    if not groups:
        return 0
    resources = SLURM_DEFAULTS | config.slurm
    resources.setdefault("job_name", f"sweep-{config.name}")
    if resources["cpus_per_task"] is not None:
        resources.setdefault("srun_args", [f"--cpus-per-task={resources['cpus_per_task']}"])  # srun does not take it over
    try:
        executor = submitit.SlurmExecutor(_log_folder(config), max_num_timeout=_REQUEUES)
        executor.update_parameters(**{name: value for name, value in resources.items() if value is not None})
        with executor.batch():
            jobs = [executor.submit(Job(group, config.threads)) for group in groups]
        ids = {group[0].training.name: job.job_id for group, job in zip(groups, jobs, strict=True)}
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise UserError(f"Slurm did not take the jobs ({reason}): change slurm.NAME=VALUE, or cluster=local") from error
    write_atomically(_jobs_file(config), json.dumps(_submitted(config) | ids, indent=2).encode())
    return len(jobs)


def wait_slurm(config: SweepConfig, cells: list[Cell], say=print) -> None:
    """Return when no job of these cells is in the queue any more."""
    groups = by_training(cells)
    while groups:
        queued = queued_trainings(config)
        for group in [group for group in groups if group[0].training.name not in queued]:
            groups.remove(group)
            _report(group, say)
        if groups:
            time.sleep(10 * _POLL)


def queued_trainings(config: SweepConfig) -> set[str]:
    """Return the names of the trainings whose jobs are in Slurm's queue, pending or running.

    Raises:
        UserError: Slurm does not answer.
    """
    submitted = _submitted(config)
    if not submitted:
        return set()
    if not shutil.which("squeue"):
        warnings.warn("no squeue on this machine: what is in Slurm's queue is not seen from here", stacklevel=2)
        return set()
    for _ in range(10):  # a controller may be away for a while
        answer = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %F"], capture_output=True, text=True)
        if answer.returncode == 0:
            alive = set(answer.stdout.split())
            return {name for name, job in submitted.items() if job in alive}
        time.sleep(10 * _POLL)
    raise UserError(f"squeue does not answer ({answer.stderr.strip()}): try again later; submitted jobs go on meanwhile")


def _report(group: list[Cell], say) -> None:
    for cell in group:
        say(f"{state(cell):8} {cell.name}")


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"\d+(,\d+)*", visible):
        return [int(number) for number in visible.split(",")]
    import torch

    return list(range(torch.cuda.device_count()))


def _log_folder(config: SweepConfig) -> Path:
    # Workers find this project's packages as their programs do.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return grid_folder(config) / "jobs"


def _jobs_file(config: SweepConfig) -> Path:
    return grid_folder(config) / "jobs.json"


def _submitted(config: SweepConfig) -> dict[str, str]:
    """Slurm's number of each training's latest job."""
    file = _jobs_file(config)
    return json.loads(file.read_text()) if file.is_file() else {}
