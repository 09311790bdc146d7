"""Prompts as the pipeline's own tokenizer sees them, with the textual inversions that it knows."""

from collections.abc import Callable, Sequence
from typing import Any

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import BranchPrompts, parse_prompt
from ldm.errors import UserError


def parse_for(pipe: Any, names: Sequence[ConceptName], prompt: str, auxiliary_noun: str | None = None) -> BranchPrompts:
    """Derive both branches' prompts from one, their positions counted in the pipeline's tokens.

    Raises:
        UserError: the prompt does not name the concept, or is too long.
    """
    tokenize = _tokenize(pipe)
    ids = pipe.tokenizer.convert_tokens_to_ids([token for name in names for token in name.learned])
    branches = parse_prompt(prompt, names, auxiliary_noun, tokenize, ids)
    for text, row, length in (
        (branches.concept, branches.concept_ids, branches.concept_length),
        (branches.auxiliary, branches.auxiliary_ids, branches.auxiliary_length),
    ):
        if tokenize(text) != list(row[1:length]):
            raise UserError(
                f"the tokenizer cuts '{text}' otherwise than around the concept: put spaces or commas around the concept"
            )
    return branches


def _tokenize(pipe: Any) -> Callable[[str], list[int]]:
    # A textual inversion of several vectors is one word in the prompt and several tokens.
    return lambda text: pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer), add_special_tokens=False).input_ids
