"""Who makes which picture: claims of the processes that work in one folder, which end with the process that holds them."""

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claims:
    """Exclusive claims on numbers, each a lock on one byte of a file (POSIX record locks, fcntl(2)).

    The system takes the locks back when their process ends, however it ends, so that no claim outlives a
    killed worker. They hold between processes, not between threads of one. Over NFS they hold between
    machines where its lock service runs, as it does by default; on a file system without locks there is
    a warning, and nothing but the shards keeps the workers apart.
    """

    def __init__(self, file: str | Path):
        """Open the file, which is never read nor written; one `Claims` of a file in a process at a time."""
        self.file, self._warned = file, False
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, numbers: range) -> bool:
        """Claim consecutive numbers from 0 on; whether they are this process's now, all of them."""
        # The first byte stands for the folder as a whole.
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, len(numbers), 1 + numbers.start)

    def give_back(self, numbers: range) -> None:
        """Let others claim the numbers."""
        self._lock(fcntl.LOCK_UN, len(numbers), 1 + numbers.start)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in this block, and keep others out of it."""
        self._lock(fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, 1, 0)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._descriptor)

    def _lock(self, how: int, length: int, start: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, how, length, start)
        except OSError as error:
            if error.errno in _TAKEN and how & fcntl.LOCK_NB:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            if not self._warned:
                warnings.warn(f"the file system of {self.file} has no locks: workers on one folder need --shard",
                              stacklevel=2)  # fmt: skip
            self._warned = True
        return True
