"""Warnings of libraries that read a user's file: passed on with the file's name, or left out."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def warnings_of(file: str | Path, explain: Callable[[str], str | None]) -> Iterator[None]:
    """Pass on a library's warnings once the file is read, each kind once; what cannot be read is an error anyway.

    Args:
        explain: a warning's text -> what to say of the file; None: no user needs to know.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lines = dict.fromkeys(explain(next(iter(str(warning.message).splitlines()), "")) for warning in caught)
    for line in filter(None, lines):
        warnings.warn(f"{file}: {line}", stacklevel=4)
