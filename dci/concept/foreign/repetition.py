"""Content that several files of one concept repeat, such as a LoRA with the tokens inside and the tokens' own file."""

from itertools import combinations

import torch
from torch import Tensor

from dci.concept.foreign.content import Content
from ldm.errors import UserError


def without_repetition(sources: list[str], contents: list[Content]) -> tuple[list[Content], list[str]]:
    """Return the contents with tokens that two of them hold alike in the first only, and a line on each such file.

    Args:
        sources: the contents' files, for messages.

    Raises:
        UserError: two files bring the same change, which would count twice, or set a weight to different numbers.
    """
    for (first, a), (second, b) in combinations(zip(sources, contents, strict=True), 2):
        _check_weights(first, a, second, b)
    kept: list[Content] = []
    lines = []
    for source, content in zip(sources, contents, strict=True):
        known = [rows for other in kept for rows in other.tokens]
        new = tuple(rows for rows in content.tokens if not any(_alike(rows, other) for other in known))
        if len(new) < len(content.tokens):
            lines.append(f"{source} holds learned tokens that another file brings already: they are taken once")
        kept.append(content.with_(tokens=new))
    return kept, lines


def _check_weights(first: str, a: Content, second: str, b: Content) -> None:
    both = a.weights.keys() & b.weights.keys()
    different = next((name for name in sorted(both) if not _alike(a.weights[name], b.weights[name])), None)
    if different:
        raise UserError(
            f"{first} and {second} both replace '{different}', and not by the same numbers: give the files of "
            "one concept, and merge concepts afterwards"
        )
    for ours, theirs in ((_products(a), _products(b)), (a.changes, b.changes)):
        same = ours.keys() & theirs.keys()
        if same and all(_alike(ours[name], theirs[name]) for name in same):
            raise UserError(
                f"{second} changes weights by the same numbers as {first}: give one of them, for both together "
                "would count twice"
            )


def _products(content: Content) -> dict[str, Tensor]:
    """The factors stand for the product: equal factors make equal changes."""
    return {name: torch.cat([change.u.flatten(), change.v.flatten()]) for name, change in content.low_rank.items()}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to the fp16 that files are written in."""
    return a.shape == b.shape and torch.equal(a.half(), b.half())
