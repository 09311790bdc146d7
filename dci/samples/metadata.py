"""What images were made with, in one normal form, and where two such records part."""

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

_PATHS = {"concept", "model", "checkpoint", "vae", "init_image", "mask", "images", "regularization", "folder", "config"}
"""Names whose values are paths (or ids on a hub)."""

_BY_FILE = {"loras", "concept_files", "files"}
"""Names of dicts of hashes by files, which may lie elsewhere now; behind a LoRA's file stands its strength."""


class Difference(NamedTuple):
    """The first leaf in which two records part."""

    name: str  # dotted
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"'{self.name}' is {shortened(self.there)} there and {shortened(self.here)} here"


def normal_form(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples are lists, keys are texts, paths too, dataclasses are dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return normal_form(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): normal_form(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [normal_form(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def first_difference(there: Any, here: Any, tolerated: Collection[str] = ()) -> Difference | None:
    """Return the first leaf that differs; None where the records say the same.

    Paths are compared by what they point to: by the hash of the content where both records have one
    (NAME_hash beside NAME), else as places on the disk.

    Args:
        tolerated: dotted names that may differ.
    """
    return _difference(normal_form(there), normal_form(here), "", frozenset(tolerated))


def shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _difference(there: Any, here: Any, name: str, tolerated: frozenset[str]) -> Difference | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in here | there:
            inner = f"{name}.{key}" if name else key
            if key in _BY_FILE and _by_hash(there.get(key)) == _by_hash(here.get(key)):
                continue
            if inner in tolerated or _decided_by_hash(key, there, here):
                continue
            if found := _difference(there.get(key), here.get(key), inner, tolerated):
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return next((found for i, pair in pairs if (found := _difference(*pair, f"{name}[{i}]", tolerated))), None)
    return None if _same_leaf(there, here, name) else Difference(name, there, here)


def _by_hash(files: Any) -> Any:
    """A dict of hashes by files as (strength, hash) of each, in their order."""
    if not isinstance(files, dict):
        return files
    strengths = (re.search(r":([-+]?[\d.]+(?:e[-+]?\d+)?)$", file) for file in files)
    return [(float(found[1]) if found else 1.0, known) for found, known in zip(strengths, files.values(), strict=True)]


def _decided_by_hash(key: str, there: dict, here: dict) -> bool:
    # A checkpoint's weights are the model's.
    decisive = "model_hash" if key == "checkpoint" else f"{key}_hash"
    return there.get(decisive) is not None and here.get(decisive) is not None


def _same_leaf(there: Any, here: Any, name: str) -> bool:
    if there == here or (there != there and here != here):  # not a number is what it was
        return True
    leaf = name.rpartition(".")[2].partition("[")[0]
    texts = isinstance(there, str) and isinstance(here, str)
    return texts and leaf in _PATHS and Path(there).resolve() == Path(here).resolve()
