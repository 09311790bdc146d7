"""Pickled checkpoints (.ckpt, .pt, .bin), read without running anything that they hold.

torch's restricted unpickler rebuilds tensors and containers and nothing else. Training frameworks also
pickle their callbacks and configurations; such classes are never imported: something inert takes their
place. Any other name in a file is an error that quotes it.
"""

import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import safe_globals

from ldm.errors import UserError
from ldm.library_warnings import warnings_of
from ldm.texts import openable

_FRAMEWORKS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf")
_HARMLESS = {
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool", "bytes")),
    *("numpy." + name for name in ("dtype", "ndarray", "core.multiarray.scalar", "core.multiarray._reconstruct")),
    *("numpy." + name for name in ("_core.multiarray.scalar", "_core.multiarray._reconstruct")),
    *("typing.Any", "collections.defaultdict", "pathlib.PosixPath", "pathlib.WindowsPath", "argparse.Namespace"),
}
"""Names that checkpoints carry besides and that are replaced as well: nothing of theirs is needed."""

_MAPPINGS = ("AttributeDict", "defaultdict")  # the unpickler fills mappings of its own types alone
_DAMAGED: tuple[type[Exception], ...] = (
    EOFError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    UnicodeError,
    OverflowError,
    MemoryError,
)
"""What a damaged file makes of the reader."""

_LEGACY_PICKLES = 5  # of a file from before torch 1.6: magic number, version, system, content, storage keys


class _Inert:
    """Stands for an object of a class that is not to be imported; takes everything, does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*_: Any) -> OrderedDict:
    return OrderedDict()


def read_pickled(file: str | Path) -> Any:
    """Return what a pickled checkpoint holds, its tensors on the CPU, memory-mapped where the file allows it.

    Raises:
        UserError: the file is broken, or names something that is neither a tensor nor a container.
    """
    try:
        names, mappable = _scan(Path(file))
        foreign = {name for name in names if name not in _known()}
        hostile = sorted(name for name in foreign if name.split(".")[0] not in _FRAMEWORKS and name not in _HARMLESS)
        if hostile:
            raise UserError(
                f"{file} is refused, nothing of it was run: it asks for {', '.join(hostile[:3])}, and a checkpoint may "
                "hold tensors and containers only: get it as .safetensors from someone you trust"
            )
        stand_ins: list[Any] = [(_stand_in(name), name) for name in foreign]  # torch wants a list of anything
        with openable(file) as path, safe_globals(stand_ins), warnings_of(file, _explain):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors and containers, nothing of it was run ({_first(error)})") from error
    except _DAMAGED as error:
        raise UserError(f"{file} is not a whole checkpoint ({_first(error)}): fetch or make it anew") from error


def _explain(warning: str) -> str | None:
    """Say what a warning of torch's means; None: nothing, of kinds of tensors that no model has: they are refused later."""
    return None if re.search("sparse|quantiz|nested tensor|typedstorage", warning, re.IGNORECASE) else warning


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _stand_in(name: str) -> Any:
    return _mapping if name == "collections.defaultdict" else OrderedDict if name.endswith(_MAPPINGS) else _Inert


def _known() -> set[str]:
    """Names that torch's restricted unpickler knows by itself."""
    from torch import _weights_only_unpickler as unpickler

    return set(unpickler._get_allowed_globals())


def _scan(file: Path) -> tuple[set[str], bool]:
    """Return the global names in a file's pickles, and whether its tensors can be memory-mapped."""
    names: set[str] = set()
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as stream:
            if stream.read(2) == b"PK":
                raise zipfile.BadZipFile("the end of the archive is missing")
            stream.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _collect_globals(stream, names)
        return names, False
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(f"{file} is a TorchScript program, not a checkpoint: it is not run; give the weights themselves")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if not pickles or not any(entry.filename.endswith("/version") for entry in entries):
            raise zipfile.BadZipFile("an archive, but not one of torch.save")
        for entry in pickles:
            with archive.open(entry) as stream:
                _collect_globals(stream, names)
    # Compressed entries have to be unpacked, so they cannot be mapped.
    return names, all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _collect_globals(stream: IO[bytes], names: set[str]) -> None:
    """Add "module.name" of everything that one pickle would import to `names`; nothing is executed.

    Names that a pickle puts together on its stack are found from its last two strings; those
    that this overlooks are still refused by the unpickler. A pickle that breaks off yields what comes before.
    """
    strings: list[str] = []
    memo: dict[Any, Any] = {}
    last: Any = None
    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(stream)
    while True:
        try:
            opcode, argument, _ = next(operations)
        except (StopIteration, ValueError, IndexError):
            return
        if opcode.name in ("GLOBAL", "INST"):
            names.add(_modern(*argument.split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            names.add(_modern(*strings[-2:]) if len(strings) > 1 else "an unnamed object")
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif "PUT" in opcode.name:
            memo[argument] = last
        else:
            last = memo.get(argument) if "GET" in opcode.name else argument
            if isinstance(last, str) and opcode.name not in ("GLOBAL", "INST"):
                strings.append(last)


def _modern(module: str, name: str) -> str:
    """The name that Python 3 gives to what older pickles say, as torch's unpickler does."""
    from torch import _weights_only_unpickler as unpickler

    module, name = unpickler.NAME_MAPPING.get((module, name), (module, name))
    return f"{unpickler.IMPORT_MAPPING.get(module, module)}.{name}"
