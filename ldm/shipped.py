"""Where the files lie that come with the programs: configurations, the embedded model, demo concepts, prompt lists."""

from pathlib import Path

_INSTALLED = Path(__file__).with_name("_shipped")

ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1]
"""The folder that holds `configs/` and `data/`: the clone, or in an installed package a folder beside this file."""


def find(path: str | Path) -> Path:
    """Return a path as it is, or the shipped file of that name where `configs/...` or `data/...` leads to nothing.

    So that `configs/train/ico-tiny.yaml` names the same file in any folder.
    """
    path = Path(path)
    shipped = path.parts[:1] in (("configs",), ("data",)) and not path.exists() and (ROOT / path).exists()
    return ROOT / path if shipped else path


def program(script: str, verb: str) -> str:
    """Return how a user starts a program: by its script in a clone, by its verb where the package is installed."""
    return f"dci {verb}" if ROOT == _INSTALLED else f"python scripts/{script}"
