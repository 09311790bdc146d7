"""The memory that a device has left, and asynchronous copies to it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_CGROUPS = Path("/sys/fs/cgroup")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def free_memory(device: torch.device | str) -> int:
    """Bytes that new tensors can have on a device.

    What PyTorch keeps for reuse counts; what a container or a job may not take does not.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(min([_available(), *_left_in_cgroups()]), 0)


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; asynchronously to a GPU, so that neither its queue nor the caller waits."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _available() -> int:
    """What Linux can hand out; elsewhere the machine's memory."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def _left_in_cgroups() -> Iterator[int]:
    """What each control group around this process (a container, a Slurm job) may still take."""
    own = Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, names = (_CGROUPS / "memory", _V1) if kinds else (_CGROUPS, _V2)
        group = root / path.strip("/")
        for folder in (group, *group.parents)[: len(group.relative_to(root).parts) + 1]:
            # A group without limits has no such file, or "max" in it.
            with contextlib.suppress(OSError, ValueError):
                yield _left(folder, *names)


def _left(folder: Path, limit: str, usage: str, cache: str) -> int:
    """What is left in one group; files that were read count as usage, but give way."""
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(counts.get(cache, 0))
