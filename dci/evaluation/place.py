"""Where a result stands in a grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The names of a grid's concept, method and setting, and the seed of training and sampling."""

    concept: str
    method: str
    seed: int
    setting: str
