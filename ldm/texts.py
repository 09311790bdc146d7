"""Texts that hold paths: a path is bytes, and not all of them are characters."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_SURROGATE = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    r"""Return a text that UTF-8 can hold: what stands for a byte that is no character is written as `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


def plotted(text: str) -> str:
    """Return a text that matplotlib shows as it is, dollar signs included, which would begin a formula."""
    return readable(text).replace("$", r"\$")


def shell_words(words: Iterable[str]) -> str:
    """Return words as they are pasted into a shell, with the bytes that they stand for."""
    return " ".join(_ansi_c(word) if _SURROGATE.search(word) else shlex.quote(word) for word in words)


def _ansi_c(word: str) -> str:
    plain = {byte: chr(byte) for byte in range(32, 127) if chr(byte) not in "'\\"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"


@contextmanager
def openable(file: str | Path) -> Iterator[Path]:
    """Give a file's path, or that of a link to it, as libraries open it that take UTF-8 alone (safetensors, torch)."""
    path = Path(file)
    if readable(str(path)) == str(path):
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"file{readable(path.suffix)}"
        link.symlink_to(path.resolve())
        yield link


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one is likely to mean; None: none is like it."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=_ALIKE)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the nearest known one, or if none is near, all of them."""
    known = list(known)
    near = nearest(name, known)
    return f"; did you mean '{near}'?" if near else f": expected one of {', '.join(known)}"


_ALIKE = 0.5  # of difflib's ratio: `prompt` for `promt`, and nothing for `foo`
