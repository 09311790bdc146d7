"""Modifier tokens V*: their names, their ids, and what they start from."""

from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from ldm import tokenizer
from ldm.errors import UserError
from ldm.tokenizer import VOCAB_SIZE

RARE_TOKENS = {"ktn": 42170, "pll": 47629, "ucd": 43514}
"""Rare entries of CLIP's vocabulary, the usual start of modifier tokens.

They are known by these ids: the first two are word beginnings, which the tokenizer makes of no
word that stands alone.
"""

MAX_MODIFIERS = 3


class Subject(NamedTuple):
    """A concept as prompts name it."""

    modifier_tokens: tuple[str, ...]  # such as ("<new1>", "<new2>")
    class_noun: str


def modifier_names(numbers: int | list[int]) -> tuple:
    """Return the names of a concept's 1 to 3 modifier tokens, ("<new1>", ...); of several concepts, a tuple for each.

    Raises:
        UserError: another number.
    """
    if isinstance(numbers, int):
        return modifier_names([numbers])[0]
    for number in numbers:
        if not 1 <= number <= MAX_MODIFIERS:
            raise UserError(f"{number} modifier tokens: expected 1 to {MAX_MODIFIERS} words in concept.initial_words")
    ends = accumulate(numbers)
    return tuple(tuple(f"<new{i + 1}>" for i in range(end - n, end)) for end, n in zip(ends, numbers, strict=True))


def modifier_ids(number: int) -> list[int]:
    """Return the ids of the modifier tokens: the first ones beyond CLIP's vocabulary."""
    return [VOCAB_SIZE + i for i in range(number)]


def initial_embeddings(words: list[str], token_table: Tensor) -> Tensor:
    """Return copies of the embeddings of `words`, one token each: (n, d).

    Raises:
        UserError: a word is not one token of the vocabulary.
    """
    ids = []
    for word in words:
        tokens = [RARE_TOKENS[word]] if word in RARE_TOKENS else tokenizer.tokenize(word)
        if len(tokens) != 1:
            raise UserError(
                f"'{word}' is {len(tokens)} tokens: a modifier token starts from a word of one token, "
                f"such as {', '.join(RARE_TOKENS)}"
            )
        ids += tokens
    return token_table[ids].detach().clone().float()
