"""Errors that a user can mend, and how a program ends with them or when its output is closed."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ldm import extras


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: what was given, what was expected, what to do. Programs print it
    without a traceback and leave with exit code 2; library users can catch it.
    """


class Note(UserWarning):
    """What the user asked for has no effect, or an unexpected one: worth a line, not worth stopping."""


@contextmanager
def reported_in_one_line(as_options: Callable[[str], str] = str) -> Iterator[None]:
    """Around a program: a user's mistake, an unusable file or a missing extra becomes one line and exit code 2.

    Characters that the output's encoding lacks are written as escapes. When the reader of the
    output has gone, as behind `| head -1`, the rest is dropped, and the program's work goes on.

    Args:
        as_options: puts the program's names of options in place of the library's.
    """
    before = sys.stdout, sys.stderr
    warnings.formatwarning = lambda message, kind, *_, **__: f"{'note' if kind is Note else 'warning'}: {message}\n"
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
    except UserError as error:
        _end(f"error: {as_options(str(error))}", 2)
    except ModuleNotFoundError as error:
        line = extras.describe(error)
        if line is None:
            raise
        _end(f"error: {line}", 2)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _end(f"error: cannot read or write {reason}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        line = (
            "not enough memory: make fewer images at a time or smaller ones (batch_size=, height=, width=; in training "
            "training.micro_batch=)"
        )
        _end(f"error: {as_options(line)}", 2)
    except KeyboardInterrupt:
        _end("stopped", 130)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, or of a GPU, by what torch says of both."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


class Output:
    """A text stream that takes every character and whose reader may leave."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; when the reader has gone, drop the text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush; when the reader has gone, drop what is left."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """From now on write into nothing, so that Python's last flush finds a reader, too."""
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
