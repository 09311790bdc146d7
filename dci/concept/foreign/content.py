"""The concept in a foreign file, whatever its format."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dci.concept.concept_file import LowRank


@dataclass(frozen=True)
class Content:
    """A file's weights under SD's names, its tokens, and notes for the user."""

    kind: str  # for people: "kohya LoRA", "Adobe's delta", ...
    weights: dict[str, Tensor] = field(default_factory=dict)  # whole weights
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # changes of low rank
    changes: dict[str, Tensor] = field(default_factory=dict)  # whole changes
    tokens: tuple[Tensor, ...] = ()  # embeddings (n, d) of the modifier tokens
    said: tuple[str, ...] = ()  # what the user should know
    trigger: str = ""  # words that stand for the concept, where the file names them
    facts: dict[str, str] = field(default_factory=dict)  # of the concept that it was exported from

    def with_(self, **changed: Any) -> "Content":
        """Return a copy with some fields replaced."""
        return replace(self, **changed)


def add_low_rank(a: LowRank, b: LowRank) -> LowRank:
    """The sum of two changes of one weight: their factors side by side, exact."""
    return LowRank(torch.cat([a.u, b.u], dim=1), torch.cat([a.v, b.v.view(len(b.v), *a.v.shape[1:])]))


def joined(contents: list[Content]) -> Content:
    """Several files of one concept as one: changes add up, tokens stand one behind another."""
    low_rank: dict[str, LowRank] = {}
    changes: dict[str, Tensor] = {}
    for content in contents:
        for name, change in content.low_rank.items():
            low_rank[name] = add_low_rank(low_rank[name], change) if name in low_rank else change
        for name, whole in content.changes.items():
            changes[name] = changes[name].float() + whole.float() if name in changes else whole
    for name in low_rank.keys() & changes.keys():
        product = low_rank.pop(name).product()
        changes[name] = changes[name].float() + product.view(changes[name].shape)
    return Content(
        kind=" and ".join(dict.fromkeys(content.kind for content in contents)),
        weights={name: weight for content in contents for name, weight in content.weights.items()},
        low_rank=low_rank,
        changes=changes,
        tokens=tuple(rows for content in contents for rows in content.tokens),
        said=tuple(line for content in contents for line in content.said),
        trigger=next((content.trigger for content in contents if content.trigger), ""),
        facts={key: value for content in reversed(contents) for key, value in content.facts.items()},
    )
