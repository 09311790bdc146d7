"""Prompt -> concept prompt, auxiliary prompt, and where the concept and its noun stand in them."""

import re
from dataclasses import dataclass
from itertools import accumulate

from dci.tokens import Subject, modifier_ids
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
    prompt: str,
    modifier_tokens: tuple[str, ...],
    class_noun: str,
    auxiliary_noun: str | None = None,
    several: tuple[Subject, ...] = (),
) -> BranchPrompts:
    """Derive both branches' prompts from one.

    The concept is written V*, {} or as its modifier tokens; of several concepts, the first is V1*,
    {0} or its tokens, the second V2*, {1} or its, and so on. The class noun may follow; where it
    does not, it is put there.

    Args:
        modifier_tokens: the concept's, such as ("<new1>", "<new2>").
        class_noun: the ordinary word for the concept, such as "dog".
        auxiliary_noun: what the auxiliary prompt has in the concept's place; None: the class noun.
        several: the concepts, where there are more than one; in place of tokens and noun.

    Raises:
        UserError: the prompt does not name the concept as a word of its own, names other modifier
            tokens, or is so long that the concept would be cut off.
    """
    subjects = several or (Subject(modifier_tokens, class_noun),)
    subjects = [Subject(tokens, _clean_noun(noun)) for tokens, noun in subjects]
    if auxiliary_noun is not None and len(subjects) > 1:
        raise UserError("one auxiliary noun cannot stand for several concepts: leave it out")
    auxiliary_noun = subjects[0].class_noun if auxiliary_noun is None else _clean_noun(auxiliary_noun)
    texts, mentions = _split(prompt, subjects)

    ends = list(accumulate(len(subject.modifier_tokens) for subject in subjects))
    ids = modifier_ids(ends[-1])
    concept = _Row()
    auxiliary = _Row()
    for text, (number, noun) in zip(texts, mentions, strict=False):
        tokens, class_noun = subjects[number]
        concept.add_text(text)
        own = ids[ends[number] - len(tokens) : ends[number]]
        concept.add_named(f"{' '.join(tokens)} {noun}", [*own, *tokenizer.tokenize(noun)])
        name = noun if len(subjects) > 1 or auxiliary_noun == class_noun else auxiliary_noun
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


def _split(prompt: str, subjects: list[Subject]) -> tuple[list[str], list[tuple[int, str]]]:
    """Cut a prompt at its mentions of the concepts.

    Returns:
        (the texts before, between and behind the mentions, the number of the concept that each
        mention names, with its noun as written).
    """
    if "\x00" in prompt:
        raise UserError("the prompt holds a NUL character: take it out")
    mention = re.compile("|".join(_mention(*entry, len(subjects)) for entry in enumerate(subjects)), re.IGNORECASE)
    matches = list(mention.finditer(prompt))
    marks = ["V*"] if len(subjects) == 1 else [f"V{i + 1}*" for i in range(len(subjects))]
    written = ", ".join([*marks, *(["{}"] if len(subjects) == 1 else [])])
    every = [" ".join(subject.modifier_tokens) for subject in subjects]
    if not matches:
        example = " and ".join(f"a {mark} {subject.class_noun}" for mark, subject in zip(marks, subjects, strict=True))
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
        number = next(i for i in range(len(subjects)) if match[f"name{i}"])
        texts.append(prompt[end : match.start()])
        mentions.append((number, match[f"noun{number}"] or subjects[number].class_noun))
        end = match.end()
    texts.append(prompt[end:])
    stray = next((s for text in texts if (s := re.search(r"<new\d*>|V\d*\*|\{\w*\}", text, re.IGNORECASE))), None)
    if stray:
        named = "this concept is" if len(subjects) == 1 else "these concepts are"
        raise UserError(
            f"the prompt '{_shorten(prompt)}' has '{stray.group()}', but {named} {', '.join(every)}: "
            f"write {', '.join(marks)} for all of it"
        )
    return texts, mentions


def _mention(number: int, subject: Subject, of: int) -> str:
    """The pattern of one concept's mention, its noun included."""
    names = r"\s*".join(map(re.escape, subject.modifier_tokens))
    marks = r"V\*|\{\}" if of == 1 else rf"V{number + 1}\*|\{{{number}\}}"
    noun = rf"(?:\s+(?P<noun{number}>{re.escape(subject.class_noun)}(?:e?s)?)(?!\w))?"
    return rf"(?P<name{number}>{marks}|{names}){noun}"


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
