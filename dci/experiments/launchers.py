"""The workers of a grid: processes of this machine with a device each, or Slurm's jobs, through submitit."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from dci.experiments.cell import end_with_parent
from dci.experiments.grid import GridPoint, by_training, grid_folder
from dci.experiments.runner import PACKAGES, PointBusy, Worker, is_busy
from dci.experiments.suite import SLURM, SuiteConfig
from dci.files import write_atomically
from ldm.errors import UserError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

Report = Callable[[GridPoint], None]
"""Called with each point that has come to an end."""

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
_POLL = 5.0  # seconds between looks at Slurm's queue
_BUSY = 75  # exit code of a worker whose points another one has; EX_TEMPFAIL of sysexits.h


def launch(config: SuiteConfig, points: list[GridPoint], report: Report) -> None:
    """Work through points, with Slurm those that are in its queue, and return when nothing is left to try."""
    (wait_slurm if config.cluster == SLURM else run_local)(config, points, report)


def run_local(config: SuiteConfig, points: list[GridPoint], report: Report) -> None:
    """Work through points on this machine: a worker for each GPU, or without any as many as the cores allow.

    A worker that fails or is killed costs its own training's points and no others.
    """
    gpus = _gpus() if config.device in ("auto", "cuda") else []
    shared = 1 if config.device not in ("auto", "cpu") else max(1, _cores() // config.threads)
    number = config.workers or len(gpus) or shared
    waiting, free = by_training(points), list(range(number))[::-1]
    running: dict[int, tuple[BaseProcess, list[GridPoint]]] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot, (group, patient) = free.pop(), _next(waiting)
                gpu = gpus[slot % len(gpus)] if gpus else None
                running[slot] = _start(group, config.threads, gpu, patient), group
            wait([process.sentinel for process, _ in running.values()])
            for slot, (process, group) in list(running.items()):
                if not process.is_alive():
                    process.join()
                    del running[slot]
                    free.append(slot)
                    if process.exitcode == _BUSY:
                        waiting.append(group)
                        continue
                    for point in group:
                        report(point)
    finally:  # stopped: what runs writes a checkpoint and ends
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def submit_slurm(config: SuiteConfig, points: list[GridPoint]) -> int:
    """Put an array of jobs into Slurm's queue for those points whose jobs are not in it yet.

    Returns:
        How many jobs were added.

    Raises:
        UserError: there is no Slurm here, or it does not take the jobs.
    """
    queued = queued_trainings(config)
    groups = [group for group in by_training(points) if group[0].training.name not in queued]
    if not groups:
        return 0
    import submitit

    resources = SLURM_DEFAULTS | config.slurm
    resources.setdefault("job_name", f"sweep-{config.name}")
    if resources["cpus_per_task"] is not None:
        resources.setdefault("srun_args", [f"--cpus-per-task={resources['cpus_per_task']}"])  # srun does not take it over
    paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # jobs find this project's packages
    try:
        executor = submitit.SlurmExecutor(grid_folder(config) / "jobs", max_num_timeout=_REQUEUES)
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


class Job:
    """A job as submitit runs it: points that share a training."""

    def __init__(self, points: list[GridPoint], threads: int):
        self.points, self.threads = points, threads
        self.worker = Worker(threads)

    def __call__(self) -> dict[str, str]:
        end_with_parent()
        return self.worker.work(self.points)

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit before the time limit: end the running process; the job is queued again as it was."""
        from submitit.helpers import DelayedSubmission

        self.worker.stop()
        return DelayedSubmission(Job(self.points, self.threads))


def wait_slurm(config: SuiteConfig, points: list[GridPoint], report: Report) -> None:
    """Return when no job of these points is in the queue any more."""
    groups = by_training(points)
    while groups:
        queued = queued_trainings(config)
        for group in [group for group in groups if group[0].training.name not in queued]:
            groups.remove(group)
            for point in group:
                report(point)
        if groups:
            time.sleep(_POLL)


def queued_trainings(config: SuiteConfig) -> set[str]:
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
        time.sleep(_POLL)
    raise UserError(f"squeue does not answer ({answer.stderr.strip()}): try again later; submitted jobs go on meanwhile")


def _next(waiting: list[list[GridPoint]]) -> tuple[list[GridPoint], bool]:
    """Take the first group that no other launcher is at work on; where there is none, the first, to wait for it (True)."""
    free = next((i for i, group in enumerate(waiting) if not is_busy(group)), None)
    return waiting.pop(free or 0), free is None


def _start(points: list[GridPoint], threads: int, gpu: int | None, patient: bool) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(points, threads, gpu, patient))
    process.start()
    return process


def _work(points: list[GridPoint], threads: int, gpu: int | None, patient: bool) -> None:
    """What a local worker does; asked to stop, it lets its process write a checkpoint.

    Args:
        patient: wait for points that another launcher's worker has; or else leave them at once.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the launcher, which stops its workers
    end_with_parent()
    worker = Worker(threads, gpu)

    def stop(*_: object) -> None:
        worker.stop()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        worker.work(points, wait=patient)
    except PointBusy:
        sys.exit(_BUSY)


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"\d+(,\d+)*", visible):
        return [int(number) for number in visible.split(",")]
    import torch

    return list(range(torch.cuda.device_count()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs_file(config: SuiteConfig):
    return grid_folder(config) / "jobs.json"


def _submitted(config: SuiteConfig) -> dict[str, str]:
    """Slurm's number of each training's latest job."""
    file = _jobs_file(config)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
