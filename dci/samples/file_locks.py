"""Locks that share the images of one folder out among processes, and end with the process that holds them."""

import errno
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import filelock

fcntl: ModuleType | None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FOLDER = -1  # stands for the folder as a whole


class FileLocks:
    """Exclusive locks on numbers, each on one byte of a file (POSIX record locks, fcntl(2)).

    The system takes the locks back when their process ends, however it ends, so that no lock outlives a
    killed worker. They hold between processes, not between threads of one. Over NFS they hold between
    machines where its lock service runs, as it does by default; on a file system without locks there is
    a warning, and nothing but the shards keeps the workers apart. Systems without fcntl have a file for
    each number in place of a byte.
    """

    def __init__(self, file: str | Path):
        """Open the file, which is never read nor written; one `FileLocks` of a file in a process at a time."""
        self.file, self._warned = Path(file), False
        self._held: dict[int, filelock.BaseFileLock] = {}
        if fcntl is not None:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self, numbers: range) -> bool:
        """Lock consecutive numbers from 0 on; whether they are this process's now, all of them."""
        if fcntl is None:
            return self._acquire_files(numbers, timeout=0)
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, numbers)

    def release(self, numbers: range) -> None:
        """Let others lock the numbers."""
        if fcntl is not None:
            self._lock(fcntl.LOCK_UN, numbers)
        for number in numbers:
            if number in self._held:
                self._held.pop(number).release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no other process is in this block, and keep others out of it."""
        whole = range(_FOLDER, _FOLDER + 1)
        if fcntl is None:
            self._acquire_files(whole, timeout=-1)
        else:
            self._lock(fcntl.LOCK_EX, whole)
        try:
            yield
        finally:
            self.release(whole)

    def close(self) -> None:
        """Give everything back."""
        for lock in self._held.values():
            lock.release()
        self._held.clear()
        if fcntl is not None:
            os.close(self._descriptor)

    def _acquire_files(self, numbers: range, timeout: float) -> bool:
        folder = self.file.with_name(f"{self.file.name}.files")
        folder.mkdir(exist_ok=True)
        taken: list[int] = []
        try:
            for number in numbers:
                lock = filelock.FileLock(folder / str(number))
                lock.acquire(timeout=timeout)
                self._held[number] = lock
                taken.append(number)
        except filelock.Timeout:
            for number in taken:
                self._held.pop(number).release()
            return False
        return True

    def _lock(self, how: int, numbers: range) -> bool:
        assert fcntl is not None  # the caller has checked
        try:
            fcntl.lockf(self._descriptor, how, len(numbers), numbers.start - _FOLDER)
        except OSError as error:
            if error.errno in _TAKEN and how & fcntl.LOCK_NB:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            if not self._warned:
                warnings.warn(
                    f"the file system of {self.file} has no locks: workers on one folder need shard= each", stacklevel=2
                )
            self._warned = True
        return True
