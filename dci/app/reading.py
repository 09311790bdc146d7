"""The parser's reading of a prompt, as it is typed: both branches' prompts, and which words count."""

from collections.abc import Sequence
from html import escape

from dci.app import markup
from dci.app.wanted import LONGEST_PROMPT
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import BranchPrompts, parse_prompt
from ldm import tokenizer
from ldm.errors import UserError
from ldm.tokenizer import VOCAB_SIZE


def reading(prompt: str, names: Sequence[ConceptName], auxiliary_noun: str | None) -> str:
    """Return the parsed prompt as HTML, or the parser's one-line error."""
    if not prompt.strip():
        return markup.note("Type a prompt: V* stands for the concept.")
    if len(prompt) > LONGEST_PROMPT:
        return markup.error(f"the prompt is longer than {LONGEST_PROMPT} characters: shorten it")
    try:
        read = parse_prompt(prompt, names, auxiliary_noun or None)
    except UserError as error:
        return markup.error(str(error))
    learned = [token for name in names for token in name.learned]
    rows = (
        ("Concept prompt", _words(read.concept_ids, read.concept_positions, read.concept_length, learned)),
        ("Auxiliary prompt", _words(read.auxiliary_ids, read.auxiliary_positions, read.auxiliary_length, learned)),
    )
    body = "".join(f"<dt>{title}</dt><dd>{words}</dd>" for title, words in rows)
    return f'<dl class="dci-reading">{body}</dl>{markup.note(_counts(read))}'


def _words(ids: Sequence[int], positions: Sequence[int], length: int, learned: Sequence[str]) -> str:
    """The tokens of a prompt, those that count marked; the end token is not shown."""
    shown = []
    for position, token in enumerate(ids[1:length]):
        word = learned[token - VOCAB_SIZE] if token >= VOCAB_SIZE else tokenizer.decode([token]).strip()
        text = escape(word)
        shown.append(f"<mark>{text}</mark>" if position in positions else f"<span>{text}</span>")
    return " ".join(shown)


def _counts(read: BranchPrompts) -> str:
    own, other = len(read.concept_positions), len(read.auxiliary_positions)
    return (
        f"Marked words count: {own} of {read.concept_length - 1} tokens name the concept, "
        f"{other} of {read.auxiliary_length - 1} the auxiliary noun."
    )
