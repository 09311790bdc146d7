"""Files that are whole or not there: written beside, flushed, renamed; locks on folders; lists of prompts."""

import hashlib
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from ldm.errors import UserError
from ldm.shipped import find

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that no crash leaves half of it; what was there before stays until the new one is whole.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two processes apart; the ending keeps the file from being taken for a whole one.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk is found in writing, where no name is known
            error.filename = str(path)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        # The rename itself is in the folder, which has to reach the disk too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_folder(folder: str | Path, name: str) -> None:
    """Raise UserError for a folder to write into that is a file, or lies where nothing can be written.

    Args:
        name: of the option, for the message.
    """
    whole = Path(folder).absolute()
    there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{name} {folder}: {there} is not a folder: give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{name} {folder}: {there} cannot be written to: give another place")


def folder_lock(folder: Path) -> filelock.BaseFileLock:
    """Return a folder's lock, a context; the system gives it back however the process ends.

    `acquire(timeout=0)` raises `filelock.Timeout` where another process has it.
    """
    return filelock.FileLock(folder / ".lock")


def make_new_folder(parent: Path, name: str) -> Path:
    """Make and return a folder that did not exist before: parent/name, with a number behind it where that is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def file_hash(path: str | Path) -> str:
    """Return 16 hex digits that differ between contents of files."""
    return hashlib.sha256(find(path).read_bytes()).hexdigest()[:16]


def content_hash(path: str | Path) -> str:
    """Return 16 hex digits that differ between contents: a file's, or those of all files in a folder."""
    path = find(path)
    if path.is_file():
        return file_hash(path)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(map(file_hash, inside)).encode()).hexdigest()[:16]


def safetensors_bytes(tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """Return the content of a .safetensors file, always the same for the same tensors and metadata.

    The library writes the metadata in an order that differs from process to process; here it is sorted.
    """
    from safetensors.torch import save  # with torch, which takes seconds; locks and files need neither

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_prompts(file: str | Path, name: str | None = None) -> list[str]:
    """Return the prompts of a UTF-8 file, one in each line; blank lines do not count.

    Args:
        name: of the file in messages; None: its path.

    Raises:
        UserError: there are none, or it is not UTF-8.
    """
    try:
        # Not splitlines: a prompt may hold characters that it would split at, such as U+2028.
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name or file} is not UTF-8 text: expected a prompt in each line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{name or file} holds no prompts: expected one in each line")
    return prompts
