"""Notes for the user about arguments and prompt syntax without effect, as our own sampling gives them."""

import re
from typing import Any

from dci.concept.prompts import MARK
from dci.diffusers.loaded import loaded_concept
from dci.diffusers.tokens import missing_tokens
from ldm.prompt_notes import prompt_notes


def call_notes(pipe: Any, arguments: dict[str, Any], guidance_scale: float) -> list[str]:
    """Return a note for whatever has no effect, or an unexpected one.

    Args:
        arguments: of the pipeline's call.
        guidance_scale: the pipeline's default.
    """
    prompts, negative = (
        [text for name in names for text in _texts(arguments.get(name))]
        for names in (("prompt", "prompt_2"), ("negative_prompt", "negative_prompt_2"))
    )
    notes = prompt_notes([*prompts, *negative])
    mark = next((found for text in [*prompts, *negative] if (found := re.search(MARK, text, re.IGNORECASE))), None)
    # A textual inversion may be called like a concept's token.
    if mark and loaded_concept(pipe) is None and missing_tokens(pipe, [mark.group()]):
        notes.append(
            f"'{mark.group()}' names a concept, and there is none: it is read as text; call load_concept(file) first"
        )
    scale = arguments.get("guidance_scale", guidance_scale)
    if any(negative) and scale <= 1:
        notes.append(f"the negative prompt has no effect: guidance_scale {scale:g} is no guidance; raise guidance_scale=")
    return notes


def _texts(prompts: str | list[str] | None) -> list[str]:
    if prompts is None:
        return []
    return [prompts] if isinstance(prompts, str) else list(prompts)
