"""Memory-mapped tensors: handing their pages back after a look at them, so that loading does not hold the whole file."""

import bisect
import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux


def releaser() -> Callable[[Tensor], None]:
    """Return a function that gives the memory of a tensor back if it is a file's, to be read again when it is next used.

    Only for tensors that were mapped before this call and never written to: a change would be lost.
    Tensors with memory of their own are left alone, and so are all where the system has no such maps.
    """
    if not _MAPS.is_file():
        return lambda tensor: None
    regions = _private_file_regions()
    starts = [start for start, _ in regions]
    libc = ctypes.CDLL(None)

    def release(tensor: Tensor) -> None:
        if not tensor.is_contiguous() or not tensor.is_cpu:
            return
        # Whole pages inside the tensor; those at its ends hold others' values too.
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        place = bisect.bisect_right(starts, first) - 1
        if first < end and place >= 0 and end <= regions[place][1]:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONTNEED)

    return release


def _private_file_regions() -> list[tuple[int, int]]:
    """(start, end) addresses of the files that this process maps writable and privately, as weights are."""
    regions = []
    for line in _MAPS.read_text(errors="replace").rstrip("\n").split("\n"):  # splitlines would split paths, too
        place, permissions, _, _, inode = line.split(None, 5)[:5]
        if permissions == "rw-p" and inode != "0":
            start, end = place.split("-")
            regions.append((int(start, 16), int(end, 16)))
    return sorted(regions)
