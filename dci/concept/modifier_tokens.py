"""Modifier tokens V*: their names, their ids, and what they start from."""

from collections.abc import Callable, Sequence
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

Tokenize = Callable[[str], list[int]]
"""Text -> token ids, without start and end."""


class ConceptName(NamedTuple):
    """How prompts name a concept; a file may hold several."""

    modifier_tokens: tuple[str, ...]  # such as ("<new1>", "<new2>")
    class_noun: str

    @property
    def learned(self) -> tuple[str, ...]:
        """The tokens that have embeddings of their own; the others are words of the vocabulary."""
        return tuple(token for token in self.modifier_tokens if is_learned(token))


def is_learned(token: str) -> bool:
    """Whether a modifier token has an embedding of its own, as "<new1>" has and the trigger word of a LoRA has not."""
    return token.startswith("<") and token.endswith(">")


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


def token_ids(
    tokens: tuple[str, ...], first: int, tokenize: Tokenize = tokenizer.tokenize, ids: Sequence[int] | None = None
) -> list[int]:
    """Return the ids of a concept's modifier tokens: learned ones are numbered beyond CLIP's vocabulary, words are in it.

    Args:
        first: number of learned tokens in the concepts before it.
        tokenize: of words.
        ids: of all learned tokens, in place of the first ones beyond CLIP's vocabulary.
    """
    own = iter((modifier_ids(first + len(tokens)) if ids is None else ids)[first:])
    return [i for token in tokens for i in ([next(own)] if is_learned(token) else tokenize(token))]


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
