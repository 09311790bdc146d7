"""Checkpoints to resume from: everything that a run has learned and remembers, in one file."""

import io
from pathlib import Path
from typing import Any

import torch

from dci.files import write_atomically
from ldm.errors import UserError
from ldm.texts import openable

_FORMAT = "dci-checkpoint"


class Checkpoints:
    """The checkpoints of a run; the last `keep` of them are kept."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def files(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.ckpt"))

    def latest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return next(reversed(self.files()), None)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint; only when it is on the disk are older ones taken away.

        Raises:
            OSError: it cannot be written; the older ones are all still there.
        """
        content = io.BytesIO()
        torch.save({"format": _FORMAT, "step": step, **state}, content)
        file = self.folder / f"step-{step:06}.ckpt"
        write_atomically(file, content.getvalue())
        # Later ones are of a run that went on before this one was taken up again from further back.
        kept = [f for f in self.files() if f <= file][-self.keep :]
        for other in self.files():
            if other not in kept:
                other.unlink()
        return file


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        UserError: it is missing, broken, or something else.
    """
    try:
        with openable(file) as path:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what reading broken files can raise is not listed anywhere
        raise UserError(f"{file} is not a whole checkpoint of a run: give another one, or the run folder") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{file} is not a checkpoint to resume from: give a run folder, or a step-*.ckpt of it")
    return state
