"""Notes for the user about options and prompt syntax without effect."""

import re
from collections.abc import Iterable

_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?[\d.]+\s*\)|\[[^\[\]]*:[^\[\]]*\]|\({2,}|\[{2,}")
_ADAPTER = re.compile(r"<(?:lora|lyco|lycoris|hypernet|embedding)\s*:[^<>]*>", re.IGNORECASE)


def prompt_notes(prompts: Iterable[str]) -> list[str]:
    """Return a note for each kind of other programs' prompt language; here it is read as plain text.

    Args:
        prompts: negative ones included.
    """
    notes: dict[str, str] = {}
    for prompt in prompts:
        if adapter := _ADAPTER.search(prompt):
            notes.setdefault("adapter", f"'{adapter.group()}' loads nothing: prompts take no adapters, it is read as text")
        if weight := _WEIGHT.search(_ADAPTER.sub("", prompt)):
            notes.setdefault(
                "weight", f"'{weight.group()}' weighs nothing: weights in prompts are read as text, brackets too"
            )
    return list(notes.values())


def option_notes(negative: str, scale: float, strength: float | None, steps: int, calls: int) -> list[str]:
    """Return a note for each option that has no effect.

    Args:
        strength: of the image to start from; None: there is none.
        steps: of the solver.
        calls: of the UNet that are left.
    """
    notes = []
    if negative and scale == 1:
        notes.append("the negative prompt has no effect: scale 1 is no guidance; raise scale=")
    if strength is not None and not calls:
        notes.append(
            f"strength {strength:g} leaves none of {steps} steps: the image stays as it is; raise strength= or steps="
        )
    return notes
