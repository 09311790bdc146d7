"""Features of image files, kept by the files' content, so that nothing is encoded twice."""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dci.evaluation.encoders import Encoder
from dci.evaluation.object_only import content_with_mask, object_alone
from ldm.errors import UserError
from ldm.images import read_image

_READING = "srgb"  # how files become images; another word makes all features anew
_TABLE = "CREATE TABLE IF NOT EXISTS features (encoder TEXT, picture TEXT, vector BLOB, PRIMARY KEY (encoder, picture))"


class FeatureStore:
    """Features in an SQLite file, or in memory for as long as the store lives.

    Each batch is written at once, so an interrupted evaluation goes on where it stopped. Several processes may
    share a file.

    Args:
        file: None: in memory.
    """

    def __init__(self, file: str | Path | None = None):
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(":memory:" if file is None else file, timeout=60)
            with self._database:
                self._database.execute(_TABLE)
        except sqlite3.Error as error:
            raise UserError(f"{file} is not a cache of features ({error}): give another file, or delete it") from error
        self._names: dict[Encoder, str] = {}

    def features(
        self,
        encoder: Encoder,
        files: Sequence[Path],
        batch_size: int = 32,
        progress: Callable[[int], object] = lambda number: None,
        object_only: bool = False,
    ) -> Tensor:
        """Return the features of image files: (n, d), fp32.

        Args:
            progress: called with how many images are done.
            object_only: see only what the mask beside an image marks; one without a mask whole.

        Raises:
            UserError: a file is not an image, or a broken one.
        """
        read, content = (object_alone, content_with_mask) if object_only else (read_image, Path.read_bytes)
        name, digests = self._name(encoder), [hashlib.sha256(content(file)).hexdigest() for file in files]
        found = {digest: vector for digest in dict.fromkeys(digests) if (vector := self._find(name, digest)) is not None}
        todo = list({digest: file for digest, file in zip(digests, files, strict=True) if digest not in found}.items())
        progress(len(files) - len(todo))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            vectors = encoder.image_features([read(file) for _, file in batch]).numpy()
            found |= {digest: vector for (digest, _), vector in zip(batch, vectors, strict=True)}
            with self._database:
                rows = [(name, digest, found[digest].tobytes()) for digest, _ in batch]
                self._database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)
            progress(len(batch))
        return torch.from_numpy(np.stack([found[digest] for digest in digests]))

    def _name(self, encoder: Encoder) -> str:
        """The encoder's name with its fingerprint, which is computed once."""
        if encoder not in self._names:
            self._names[encoder] = f"{encoder.name} {encoder.fingerprint()} {_READING}"
        return self._names[encoder]

    def _find(self, encoder: str, digest: str) -> np.ndarray | None:
        query = "SELECT vector FROM features WHERE encoder = ? AND picture = ?"
        row = self._database.execute(query, (encoder, digest)).fetchone()
        return None if row is None else np.frombuffer(row[0], dtype=np.float32).copy()
