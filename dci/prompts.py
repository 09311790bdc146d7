"""Prompt -> concept prompt, auxiliary prompt, and where the concept and its noun stand in them."""

import re
from dataclasses import dataclass

from dci.tokens import modifier_ids
from ldm import tokenizer
from ldm.errors import UserError

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
    prompt: str, modifier_tokens: tuple[str, ...], class_noun: str, auxiliary_noun: str | None = None
) -> BranchPrompts:
    """Derive both branches' prompts from one.

    The concept is written V*, {} or as its modifier tokens. The class noun may follow; where it
    does not, it is put there.

    Args:
        modifier_tokens: the concept's, such as ("<new1>", "<new2>").
        class_noun: the ordinary word for the concept, such as "dog".
        auxiliary_noun: what the auxiliary prompt has in the concept's place; None: the class noun.

    Raises:
        UserError: the prompt does not name the concept as a word of its own, names other modifier
            tokens, or is so long that the concept would be cut off.
    """
    auxiliary_noun = _clean_noun(class_noun if auxiliary_noun is None else auxiliary_noun)
    class_noun = _clean_noun(class_noun)
    texts, nouns = _split(prompt, modifier_tokens, class_noun)

    marker = " ".join(modifier_tokens)
    concept = _Row()
    auxiliary = _Row()
    for text, noun in zip(texts, nouns, strict=False):
        concept.add_text(text)
        concept.add_named(f"{marker} {noun}", [*modifier_ids(len(modifier_tokens)), *tokenizer.tokenize(noun)])
        name = noun if auxiliary_noun == class_noun else auxiliary_noun
        auxiliary.add_text(_fix_article(text, name))
        auxiliary.add_named(name, tokenizer.tokenize(name))
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


class _Row:
    """A prompt under construction: its text, its token ids, and the positions of what is named."""

    def __init__(self):
        self.text, self.ids, self.named = "", [], []

    def add_text(self, text: str) -> None:
        self.text += text
        self.ids += tokenizer.tokenize(text)

    def add_named(self, text: str, ids: list[int]) -> None:
        self.named += range(len(self.ids), len(self.ids) + len(ids))
        self.text += text
        self.ids += ids

    def check_length(self, prompt: str) -> None:
        if len(self.ids) > _ROOM:
            raise UserError(
                f"the prompt '{_shorten(prompt)}' has {len(self.ids)} tokens, its concept included, but only {_ROOM} fit: "
                f"shorten it (the part from '...{tokenizer.decode(self.ids[_ROOM - 3 : _ROOM])}' on would be cut off)"
            )


def _split(prompt: str, modifier_tokens: tuple[str, ...], class_noun: str) -> tuple[list[str], list[str]]:
    """Cut a prompt at its mentions of the concept.

    Returns:
        (the texts before, between and behind the mentions, the noun of each mention as written).
    """
    if "\x00" in prompt:
        raise UserError("the prompt holds a NUL character: take it out")
    names = r"\s*".join(map(re.escape, modifier_tokens))
    mention = re.compile(rf"(?:V\*|\{{\}}|{names})(?:\s+(?P<noun>{re.escape(class_noun)}(?:e?s)?)(?!\w))?", re.IGNORECASE)
    matches = list(mention.finditer(prompt))
    if not matches:
        raise UserError(
            f"the prompt '{_shorten(prompt)}' does not name the concept: write V*, {{}} or {' '.join(modifier_tokens)} "
            f"where the concept should be, such as 'a V* {class_noun} on the beach'"
        )
    texts, nouns, end = [], [], 0
    for match in matches:
        if re.search(r"\w$", prompt[: match.start()]) or re.match(r"\w", prompt[match.end() :]):
            raise UserError(
                f"in '{_shorten(prompt)}' the concept is part of another word: put spaces around '{match.group()}'"
            )
        texts.append(prompt[end : match.start()])
        nouns.append(match["noun"] or class_noun)
        end = match.end()
    texts.append(prompt[end:])
    stray = next((s for text in texts if (s := re.search(r"<new\d*>|V\*|\{\w*\}", text, re.IGNORECASE))), None)
    if stray:
        raise UserError(
            f"the prompt '{_shorten(prompt)}' has '{stray.group()}', but this concept is {' '.join(modifier_tokens)}: "
            "write V* for all of it"
        )
    return texts, nouns


def _fix_article(text: str, noun: str) -> str:
    """Make an article at the end of `text` agree with the noun that follows: "an " before "elephant"."""
    article = re.search(r"\b(a)n?(\s+)$", text, re.IGNORECASE)
    if not article:
        return text
    n = "n" if noun[0].lower() in "aeiou" else ""
    return text[: article.start()] + article[1] + n + article[2]


def _clean_noun(noun: str) -> str:
    noun = " ".join(noun.split())
    if not noun or not tokenizer.tokenize(noun):
        raise UserError("the noun is empty: give the ordinary word for the concept, such as dog")
    return noun


def _shorten(prompt: str) -> str:
    prompt = " ".join(prompt.split())
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
