"""Prompt -> concept prompt, auxiliary prompt, and where the concept and its noun stand in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dci.concept.modifier_tokens import ConceptName, Tokenize, is_learned, token_ids
from dci.concept.nouns import as_learned, checked_noun, fix_article, is_plural, plurals, spellings, without_article
from ldm import tokenizer
from ldm.errors import UserError

MARK = r"<new\d*>|V\d*\*|\{\w*\}"
"""Pattern of whatever looks as if it named a concept."""

_ROOM = tokenizer.MAX_LENGTH - 2  # tokens of a prompt besides start and end


@dataclass(frozen=True)
class BranchPrompts:
    """The two prompts of DCI and what its integration must know of them.

    Positions are 0-based and do not count the start token; lengths count the end token, which
    carries the meaning of the whole prompt, but neither start nor padding.
    """

    concept: str  # "a <new1> <new2> dog in times square"
    auxiliary: str  # "a dog in times square"
    concept_ids: tuple[int, ...]  # 77 token ids; modifier tokens lie beyond CLIP's vocabulary
    auxiliary_ids: tuple[int, ...]
    concept_positions: tuple[int, ...]  # M_c: modifier tokens and class noun
    auxiliary_positions: tuple[int, ...]  # M_a: auxiliary noun
    concept_length: int  # L_c
    auxiliary_length: int  # L_a

    def describe(self) -> str:
        """Return what the parser found, in two lines."""
        return (
            f"concept branch:   {self.concept!r}, concept at {list(self.concept_positions)}, length {self.concept_length}\n"
            f"auxiliary branch: {self.auxiliary!r}, noun at {list(self.auxiliary_positions)}, length {self.auxiliary_length}"
        )


def parse_prompt(
    prompt: str,
    names: ConceptName | Sequence[ConceptName],
    auxiliary_noun: str | None = None,
    tokenize: Tokenize = tokenizer.tokenize,
    ids: Sequence[int] | None = None,
) -> BranchPrompts:
    """Derive both branches' prompts from one.

    The concept is written V*, {} or as its modifier tokens; of several concepts, the first is V1*,
    {0} or its tokens, the second V2*, {1} or its, and so on. The class noun may follow; where it
    does not, it is put there.

    Args:
        names: of the concept, such as ConceptName(("<new1>", "<new2>"), "dog"), or of several.
        auxiliary_noun: what the auxiliary prompt has in the concept's place; None: the class noun.
        tokenize: a tokenizer that knows further tokens than CLIP's vocabulary.
        ids: those of the learned tokens in it; None: the first ones beyond CLIP's vocabulary.

    Raises:
        UserError: the prompt does not name the concept as a word of its own, names other modifier
            tokens, or is so long that the concept would be cut off.
    """
    concepts = _checked(names)
    if auxiliary_noun is not None and len(concepts) > 1:
        raise UserError("one auxiliary noun cannot stand for several concepts: leave it out")
    if auxiliary_noun is not None:
        auxiliary_noun = checked_noun(without_article(auxiliary_noun))
    texts, mentions = _split(prompt, concepts)

    concept, auxiliary = _Row(tokenize), _Row(tokenize)
    for text, mention in zip(texts, mentions, strict=False):
        concept.add_text(text)
        concept.add_named(*_named(mention, concepts, tokenize, ids))
        name = _auxiliary_name(mention, concepts, auxiliary_noun)
        auxiliary.add_text(fix_article(text, name, name == mention.noun and mention.written))
        auxiliary.add_named(name, tokenize(name))
    concept.add_text(texts[-1])
    auxiliary.add_text(texts[-1])
    concept.check_length(prompt)
    auxiliary.check_length(prompt)
    return BranchPrompts(
        concept.text,
        auxiliary.text,
        tuple(tokenizer.frame(concept.ids)),
        tuple(tokenizer.frame(auxiliary.ids)),
        tuple(concept.named),
        tuple(auxiliary.named),
        len(concept.ids) + 1,
        len(auxiliary.ids) + 1,
    )


def negative_ids(prompt: str, names: ConceptName | Sequence[ConceptName]) -> tuple[int, ...] | None:
    """Return the token ids of a negative prompt that names a concept, which means the concept there too.

    Returns:
        77 ids; None for a prompt that names none and is read as it stands.

    Raises:
        UserError: it names other concepts than these, or is so long that a concept would be cut off.
    """
    concepts = _checked(names)
    if not mentions(prompt, concepts):
        return None
    texts, found = _split(prompt, concepts)
    row = _Row(tokenizer.tokenize)
    for text, mention in zip(texts, found, strict=False):
        row.add_text(text)
        row.add_named(*_named(mention, concepts, tokenizer.tokenize, None))
    row.add_text(texts[-1])
    row.check_length(prompt)
    return tuple(tokenizer.frame(row.ids))


class _Mention(NamedTuple):
    """A concept in a prompt."""

    number: int  # of the concept
    noun: str  # in the number that it is written in
    written: bool  # by the prompt's author, and not put there


def _checked(names: ConceptName | Sequence[ConceptName]) -> list[ConceptName]:
    given = [names] if isinstance(names, ConceptName) else names
    return [ConceptName(tokens, checked_noun(noun)) for tokens, noun in given]


def _named(
    mention: _Mention, concepts: list[ConceptName], tokenize: Tokenize, ids: Sequence[int] | None
) -> tuple[str, list[int]]:
    """Return a concept's modifier tokens and noun, as text and as token ids."""
    first = sum(len(name.learned) for name in concepts[: mention.number])
    tokens = concepts[mention.number].modifier_tokens
    return f"{' '.join(tokens)} {mention.noun}", [*token_ids(tokens, first, tokenize, ids), *tokenize(mention.noun)]


def _auxiliary_name(mention: _Mention, concepts: list[ConceptName], auxiliary_noun: str | None) -> str:
    """Return what stands in a concept's place in the auxiliary prompt, in the same number."""
    own = concepts[mention.number].class_noun
    if auxiliary_noun is None or auxiliary_noun == own:
        return mention.noun
    return plurals(auxiliary_noun)[0] if is_plural(own, mention.noun) else auxiliary_noun


def mentions(prompt: str, names: Sequence[ConceptName]) -> bool:
    """Whether a prompt names a concept, rightly or wrongly."""
    concepts = _checked(names)
    tokens = [re.escape(token) for name in concepts for token in name.learned]
    marked = re.search("|".join([MARK, *tokens]), prompt, re.IGNORECASE)
    return marked is not None or _mentions(concepts).search(prompt) is not None


class _Row:
    """A prompt under construction: its text, its token ids, and the positions of what is named."""

    def __init__(self, tokenize: Tokenize):
        self.text, self.tokenize = "", tokenize
        self.ids: list[int] = []
        self.named: list[int] = []

    def add_text(self, text: str) -> None:
        """Append ordinary text and its token ids."""
        self.text += text
        self.ids += self.tokenize(text)

    def add_named(self, text: str, ids: list[int]) -> None:
        """Append a concept or its noun with the ids that stand for it, and note their positions."""
        self.named += range(len(self.ids), len(self.ids) + len(ids))
        self.text += text
        self.ids += ids

    def check_length(self, prompt: str) -> None:
        """Raise UserError, with the part that would be cut off, if the ids are more than the text encoder takes."""
        if len(self.ids) > _ROOM:
            raise UserError(
                f"the prompt '{_shorten(prompt)}' has {len(self.ids)} tokens, its concept included, but only {_ROOM} fit: "
                f"shorten it (the part from '...{tokenizer.decode(self.ids[_ROOM - 3 : _ROOM])}' on would be cut off)"
            )


def _split(prompt: str, concepts: list[ConceptName]) -> tuple[list[str], list[_Mention]]:
    """Cut a prompt at its mentions of the concepts.

    Returns:
        (the texts before, between and behind the mentions, and these).
    """
    if "\x00" in prompt:
        raise UserError("the prompt holds a NUL character: take it out")
    matches = list(_mentions(concepts).finditer(prompt))
    marks = ["V*"] if len(concepts) == 1 else [f"V{i + 1}*" for i in range(len(concepts))]
    written = ", ".join([*marks, *(["{}"] if len(concepts) == 1 else [])])
    every = [" ".join(name.modifier_tokens) for name in concepts]
    if not matches:
        example = " and ".join(f"a {mark} {name.class_noun}" for mark, name in zip(marks, concepts, strict=True))
        raise UserError(
            f"the prompt '{_shorten(prompt)}' does not name the concept: write {written} or {' or '.join(every)} "
            f"where the concept should be, such as '{example} on the beach'"
        )
    texts, mentions, end = [], [], 0
    for match in matches:
        if re.search(r"\w$", prompt[: match.start()]) or re.match(r"\w", prompt[match.end() :]):
            raise UserError(
                f"in '{_shorten(prompt)}' the concept is part of another word: put spaces around '{match.group()}'"
            )
        number = next(i for i in range(len(concepts)) if match[f"name{i}"])
        texts.append(prompt[end : match.start()])
        noun, own = match[f"noun{number}"], concepts[number].class_noun
        mentions.append(_Mention(number, as_learned(own, noun) if noun else own, bool(noun)))
        end = match.end()
    texts.append(prompt[end:])
    stray = next((s for text in texts if (s := re.search(MARK, text, re.IGNORECASE))), None)
    if stray:
        named = "this concept is" if len(concepts) == 1 else "these concepts are"
        raise UserError(
            f"the prompt '{_shorten(prompt)}' has '{stray.group()}', but {named} {', '.join(every)}: "
            f"write {', '.join(marks)} for all of it"
        )
    return texts, mentions


def _mentions(concepts: list[ConceptName]) -> re.Pattern:
    """The pattern of all concepts' mentions."""
    return re.compile("|".join(_mention(*entry, len(concepts)) for entry in enumerate(concepts)), re.IGNORECASE)


def _mention(number: int, name: ConceptName, of: int) -> str:
    """The pattern of one concept's mention, its noun included."""
    names = r"\s*".join(map(_pattern, name.modifier_tokens))
    marks = r"V\*|\{\}" if of == 1 else rf"V{number + 1}\*|\{{{number}\}}"
    noun = rf"(?:\s+(?P<noun{number}>{spellings(name.class_noun)})(?!\w))?"
    return rf"(?P<name{number}>{marks}|{names}){noun}"


def _pattern(token: str) -> str:
    """The pattern of a modifier token; words of the vocabulary stand by themselves, with any blanks between them."""
    escaped = r"\s+".join(map(re.escape, token.split()))
    return escaped if is_learned(token) else rf"(?<!\w){escaped}(?!\w)"


def _shorten(prompt: str) -> str:
    prompt = " ".join(prompt.split())
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
