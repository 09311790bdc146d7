"""The places of the files that come with the programs: configurations, the embedded model, demo concepts, prompt lists."""

import itertools
import sys
from pathlib import Path

from ldm.texts import shell_words

_INSTALLED = Path(__file__).with_name("_shipped")

IS_CLONE = not _INSTALLED.is_dir()
"""Whether these packages run from a clone, and not from an installed wheel."""

ROOT = Path(__file__).resolve().parents[1] if IS_CLONE else _INSTALLED
"""The folder that holds `configs/` and `data/`: the clone, or in an installed package a folder beside this file."""


def find(path: str | Path, root: str | Path = "") -> Path:
    """Return a path as it is, or the shipped file of that name where `configs/...` or `data/...` leads to nothing.

    So that `configs/train/ico-tiny.yaml` names the same file in any folder. What opens a file of a user's finds it by
    this first.

    Args:
        root: what a relative path is seen from; by itself the current folder.
    """
    path = Path(path)
    shipped = path.parts[:1] in (("configs",), ("data",)) and not (root / path).exists() and (ROOT / path).exists()
    return ROOT / path if shipped else root / path


def program(script: str, verb: str) -> str:
    """Return how to start another program of the kind that is running: the script beside it, or the verb of `dci`."""
    beside = Path(sys.argv[0]).with_name(script) if sys.argv[0] else Path(script)
    if beside.parent.name == "scripts" and beside.is_file():
        return f"python {shell_words([str(beside)])}"
    by_module = any(pair == ("-m", "dci") for pair in itertools.pairwise(sys.orig_argv))
    return f"{'python -m dci' if by_module else 'dci'} {verb}"
