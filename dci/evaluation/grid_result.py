"""The scores of a grid's point, as its result.json holds them."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dci.evaluation.place import Place
from dci.evaluation.scores import Scores, as_json, scores_of
from dci.files import write_atomically
from ldm.errors import UserError
from ldm.facts import read_fact


@dataclass(frozen=True)
class GridResult(Place):
    """A point's place in its grid, how its images were sampled, and their scores."""

    scores: Scores
    sampling: dict[str, Any] = field(default_factory=dict)  # options of the grid's sampling

    def save(self, file: str | Path) -> None:
        """Write JSON, whole or not at all."""
        content = {name.name: getattr(self, name.name) for name in fields(Place)}
        content |= {"sampling": self.sampling} | as_json(self.scores)
        write_atomically(file, json.dumps(content, indent=1).encode())

    @staticmethod
    def load(file: str | Path) -> "GridResult":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            place, scores = read_fact(Place, content), scores_of(content)
            return GridResult(**vars(place), scores=scores, sampling=content.get("sampling", {}))
        except (OSError, ValueError, UserError) as error:
            raise UserError(
                f"{file} holds no scores of a grid's point ({error}): remove it, and run the grid again"
            ) from error
