"""The concepts that can be chosen: those that ship with the project, files that were named, finished runs, uploads.

The page knows them by keys. A path never comes from a browser.
"""

import functools
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dci.concept.concept_file import Concept
from dci.concept.modifier_tokens import ConceptName
from dci.finetuning.run_folder import CONCEPT_FILE
from ldm.errors import UserError
from ldm.shipped import ROOT

DEMOS = ROOT / "data/demo"
UPLOADS = 20  # that are kept; an older one is deleted


@dataclass(frozen=True)
class Entry:
    """A concept file and its label on the page."""

    key: str
    label: str
    file: Path
    class_noun: str | None = None  # of another program's file, as its owner says
    trigger: str | None = None

    @property
    def path(self) -> str:
        """The file as a command names it: from the current folder, where it lies in that."""
        here = Path.cwd()
        return str(self.file.relative_to(here) if self.file.is_relative_to(here) else self.file)


class Shelf:
    """All concepts, read anew whenever they are asked for.

    Args:
        read: (file, class noun, trigger) -> concept.
        given: files that were named at the start.
        logdir: whose finished runs are on it.
    """

    def __init__(self, read: Callable[[Path, str | None, str | None], Concept], given: Sequence[Path], logdir: Path):
        self.given, self.logdir = [Path(file).absolute() for file in given], logdir.absolute()
        self._uploads: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._read = functools.lru_cache(maxsize=4)(lambda file, stamp, noun, trigger: read(file, noun, trigger))

    def entries(self) -> list[Entry]:
        """Return all of them but uploads: given files, demo concepts, finished runs with the newest first."""
        found = [Entry(f"file:{i}", file.name, file) for i, file in enumerate(self.given)]
        found += [Entry(f"demo:{file.stem}", f"{file.stem} (demo)", file) for file in sorted(DEMOS.glob("*.safetensors"))]
        runs = sorted(self.logdir.glob(f"*/{CONCEPT_FILE}"), reverse=True) if self.logdir.is_dir() else []
        return found + [Entry(f"run:{f.parent.name}", f.parent.name, f) for f in runs if inside(f, self.logdir)]

    def choices(self, *uploads: str) -> list[tuple[str, str]]:
        """Return (label, key) of all of them, a client's uploads first."""
        own = [self._uploads[key] for key in uploads if key in self._uploads]
        return [(entry.label, entry.key) for entry in [*own, *self.entries()]]

    def find(self, key: str | None) -> Entry:
        """Return a concept by its key.

        Raises:
            UserError: there is none.
        """
        found = self._uploads.get(key or "") or next((entry for entry in self.entries() if entry.key == key), None)
        if found is None:
            raise UserError("no concept is chosen: choose one from the list, or upload a file")
        return found

    def load(self, entry: Entry) -> Concept:
        """Read a concept, or return it as it was read before where its file is the same.

        Raises:
            UserError: the file is missing, broken, hostile, or no concept.
        """
        try:
            return self._read(entry.file, self.stamp(entry), entry.class_noun, entry.trigger)
        except UserError as error:
            raise UserError(str(error).replace(str(entry.file), entry.label)) from error

    def names(self, key: str | None) -> tuple[ConceptName, ...]:
        """Return the names that prompts may call a concept by."""
        return self.load(self.find(key)).names

    def stamp(self, entry: Entry) -> str:
        """Return a value that changes with the file's content."""
        try:
            facts = entry.file.stat()
        except OSError as error:
            raise UserError(f"{entry.label} is not there any more: choose another concept") from error
        return f"{facts.st_mtime_ns}-{facts.st_size}"

    def add(self, file: Path, name: str, class_noun: str | None = None, trigger: str | None = None) -> Entry:
        """Add an uploaded file to the shelf.

        Raises:
            UserError: it cannot be used; it is deleted.
        """
        entry = Entry(f"upload:{secrets.token_hex(8)}", name, file, class_noun, trigger)
        try:
            self.load(entry)
        except UserError:
            file.unlink(missing_ok=True)
            raise
        with self._lock:
            self._uploads[entry.key] = entry
            while len(self._uploads) > UPLOADS:
                _, oldest = self._uploads.popitem(last=False)
                oldest.file.unlink(missing_ok=True)
        return entry


def inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder once all symbolic links are followed."""
    try:
        return path.resolve(strict=True).is_relative_to(folder.resolve(strict=True))
    except OSError:
        return False
