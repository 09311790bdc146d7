"""Which of several training processes this is, as launchers say it in the environment.

Lightning is imported where it is asked: run folders are also read by programs that train nothing, and it takes seconds.
"""

import os
import secrets
from typing import TYPE_CHECKING

import torch

from ldm.errors import UserError

if TYPE_CHECKING:
    from pytorch_lightning.plugins.environments import ClusterEnvironment

_SEED = "DCI_TRAINING_SEED"  # passes the chosen seed on to the other processes of a run


def rank() -> int:
    """This process's number over all nodes; 0 where there is one process."""
    from pytorch_lightning.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", None) or 0)


def world_size() -> int:
    """Number of processes that a launcher (torchrun, srun) has started together; 1 before Lightning starts its own."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) if _launched() else 1


def check_launched(wanted: int) -> None:
    """Raise UserError if a launcher has started several processes, but not as many as the run is to have."""
    if world_size() not in (1, wanted):
        raise UserError(
            f"{world_size()} processes were started, but training.devices times training.nodes is {wanted}: "
            "give both as they are started"
        )


def chosen_seed() -> int:
    """Choose a seed that the processes of a run share: those that Lightning starts inherit it.

    Raises:
        UserError: a launcher has started several processes, each of which would choose its own.
    """
    if world_size() > 1:
        raise UserError(f"training.seed=-1 would be another seed in each of the {world_size()} processes: give the seed")
    if rank() == 0:
        os.environ[_SEED] = str(secrets.randbelow(2**32))
    return int(os.environ[_SEED])


def environments() -> list["ClusterEnvironment"]:
    """Return Lightning's cluster plugins: in a batch job without srun, the one that expects no launcher.

    By itself it would wait for as many processes as the job has tasks.
    """
    from pytorch_lightning.plugins.environments import LightningEnvironment

    return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ and not _launched() else []


def print_rank_zero(message: str) -> None:
    """Print once, however many processes there are."""
    if rank() == 0:
        print(message, flush=True)


def own_device(device: str) -> str:
    """Return the device of this process: of several on a node, each takes the GPU of its local number."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    return f"cuda:{local}" if device == "cuda" and local is not None and torch.cuda.device_count() > 1 else device


def round_alike() -> None:
    """Let the processes that Lightning starts on a CPU use as many threads each as one process alone would.

    Matrix products round differently with another number of threads, and Adam magnifies the difference
    until the loss curves of one and of several processes part visibly. More threads than cores are no
    burden as long as waiting threads sleep.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _launched() -> bool:
    """A batch job without srun has SLURM_NTASKS too, but only srun gives a process its number."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ)
