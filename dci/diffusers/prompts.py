"""Prompts as the pipeline's own tokenizer sees them, with the textual inversions that it knows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import BranchPrompts, parse_prompt
from dci.diffusers.model import encoders
from ldm.errors import UserError


def parse_for(pipe: Any, names: Sequence[ConceptName], prompt: str, auxiliary_noun: str | None = None) -> BranchPrompts:
    """Derive both branches' prompts from one, their positions counted in the pipeline's tokens.

    Raises:
        UserError: the prompt does not name the concept, or is too long, or two tokenizers cut it differently.
    """
    first, *others = [_parsed(pipe, tokenizer, names, prompt, auxiliary_noun) for tokenizer, _ in encoders(pipe)]
    if any(_places(other) != _places(first) for other in others):
        raise UserError(
            f"the pipeline's two tokenizers cut '{prompt}' differently: load its textual inversions into both text encoders"
        )
    return first


def together(first: BranchPrompts, second: BranchPrompts) -> BranchPrompts:
    """Return the prompts of SDXL's first encoder, as the integration sees them where its second one reads others.

    Raises:
        UserError: the concept, or its noun, stands elsewhere in them: a token's two halves have one place.
    """
    for branch in ("concept", "auxiliary"):
        places, others = (getattr(prompts, f"{branch}_positions") for prompts in (first, second))
        if places != others:
            raise UserError(
                f"'{getattr(second, branch)}' in prompt_2 names the concept elsewhere than '{getattr(first, branch)}': "
                "let as many tokens stand before it, since a token has one place in both text encoders"
            )
    lengths = {name: max(getattr(first, name), getattr(second, name)) for name in ("concept_length", "auxiliary_length")}
    return dataclasses.replace(first, **lengths)


def _places(branches: BranchPrompts) -> tuple:
    return (
        branches.concept_positions,
        branches.auxiliary_positions,
        branches.concept_length,
        branches.auxiliary_length,
    )


def _parsed(
    pipe: Any, tokenizer: Any, names: Sequence[ConceptName], prompt: str, auxiliary_noun: str | None
) -> BranchPrompts:
    tokenize = _tokenize(pipe, tokenizer)
    ids = tokenizer.convert_tokens_to_ids([token for name in names for token in name.learned])
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


def _tokenize(pipe: Any, tokenizer: Any) -> Callable[[str], list[int]]:
    # A textual inversion of several vectors is one word in the prompt and several tokens.
    return lambda text: tokenizer(pipe.maybe_convert_prompt(text, tokenizer), add_special_tokens=False).input_ids
