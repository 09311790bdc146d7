"""English around a concept's noun: its plurals, its spellings, the article before it."""

import re

from ldm import tokenizer
from ldm.errors import UserError

_IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "louse": "lice",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
}
_ALIKE = ("aircraft", "deer", "fish", "moose", "salmon", "sheep", "shrimp", "squid", "swine", "trout")
_IN_F = ("calf", "elf", "half", "hoof", "leaf", "loaf", "scarf", "self", "sheaf", "shelf", "thief", "wolf")
_IN_FE = ("knife", "life", "wife")
_OES = ("buffalo", "domino", "echo", "hero", "mango", "mosquito", "potato", "tomato", "tornado", "volcano")

# Sounds that spelling hides: a unicorn, a ewe, a one-eyed cat; an hourglass, an heirloom.
_CONSONANT = re.compile(
    r"uni(?!n|m|d)|eu|ewe|ewer|one(?:\b|sie)|once|us(?:a|e)|ut(?:ensil|opia|ility)|ubi|uku|ur(?:anus|ine)|ufo\b|usb\b|u-",
    re.IGNORECASE,
)
_VOWEL = re.compile(r"[aeiou]|hour|heir|honest|hono|8|11\b|18\b", re.IGNORECASE)
_SPELLED = re.compile(r"[A-Z][A-Z0-9]{0,3}\b")  # an SUV, an MP3 player, a UFO
_VOWEL_LETTERS = "AEFHILMNORSX"

_ARTICLE = r"(?:a|an|the|my|your|one)\s+"
_LEADING = re.compile(rf"{_ARTICLE}(?=\S)", re.IGNORECASE)
_PHRASE = re.compile(
    rf"{_ARTICLE}|.*(?:\bof\s+{_ARTICLE}|V\d*\*|\{{\w*\}}|<new\d*>)|(?:photo|picture|image|portrait|painting|rendering)s?\s+of\b",
    re.IGNORECASE,
)


def plurals(noun: str) -> list[str]:
    """Return the plurals of a noun that people write, the likeliest first: puppy -> puppies, puppys.

    Of several words the last one is in the plural.
    """
    before, last = re.fullmatch(r"(.*?)(\w*)", noun, re.DOTALL).groups()  # type: ignore[union-attr]
    low = last.lower()
    found = [many for one, many in _IRREGULAR.items() if low == one]
    if low.endswith("man") and low != "human":
        found.append(low[:-3] + "men")
    if low in _ALIKE or not low:
        found.append(low)
    if low in (*_IN_F, *_IN_FE):
        found.append(low.removesuffix("e")[:-1] + "ves")
    if re.search(r"[^aeiou]y$", low):
        found.append(low[:-1] + "ies")
    if re.search(r"(s|x|z|ch|sh)$", low) or low in _OES:
        found.append(low + "es")
    if low.endswith("us"):
        found.append(low[:-2] + "i")
    if low.endswith("is"):
        found.append(low[:-2] + "es")
    found += [low + "s", low + "es"]
    return [before + many for many in dict.fromkeys(found)]


def spellings(noun: str) -> str:
    """Return a pattern of a noun in the singular or a plural, its words apart or together, as the group `last` ends it.

    "teddy bear" is found in "teddy  bear", "teddy-bear", "teddy_bear" and "teddybears".
    """
    parts = [part for part in re.split(r"[\s_-]+", noun) if part]
    last = sorted({parts[-1].lower(), *plurals(parts[-1])}, key=len, reverse=True)
    return r"[\s_-]*".join([*map(re.escape, parts[:-1]), f"(?:{'|'.join(map(re.escape, last))})"])


def as_learned(noun: str, written: str) -> str:
    """Return a noun as its prompts were learned with, in the number in which it is written."""
    parts = re.split(r"[\s_-]+", noun)
    numbers = sorted([parts[-1], *plurals(parts[-1])], key=len, reverse=True)
    last = re.search(rf"(?:{'|'.join(map(re.escape, numbers))})$", written, re.IGNORECASE)
    return noun[: len(noun) - len(parts[-1])] + last.group() if last else noun


def is_plural(noun: str, written: str) -> bool:
    """Whether a noun is written in the plural, and not just as it is."""
    return as_learned(noun, written).lower() != noun.lower()


def checked_noun(noun: str) -> str:
    """Return a noun with single blanks.

    Raises:
        UserError: it is empty, or a phrase such as "a dog" or "photo of a dog".
    """
    noun = " ".join(noun.split())
    if not tokenizer.tokenize(noun):
        raise UserError("the noun is empty: give the ordinary word for the concept, such as dog")
    if _PHRASE.match(noun):
        apart = re.split(rf"(?:^|\s){_ARTICLE}|V\d*\*|\{{\w*\}}|<new\d*>|\sof\s", noun, flags=re.IGNORECASE)
        alone = without_article(apart[-1].strip()) or "dog"
        raise UserError(f"the noun '{noun}' is a phrase: give the ordinary word alone, such as {alone}")
    return noun


def without_article(noun: str) -> str:
    """Return a noun without an article in front: "a plushy toy" -> "plushy toy"."""
    return _LEADING.sub("", " ".join(noun.split()), count=1) if _LEADING.match(noun.strip()) else noun


def takes_an(noun: str) -> bool:
    """Whether "an" stands before a noun: an owl, an hourglass, an SUV; a unicorn, a UFO."""
    if _SPELLED.match(noun):
        return noun[0] in _VOWEL_LETTERS
    return bool(_VOWEL.match(noun)) and not _CONSONANT.match(noun)


def fix_article(text: str, noun: str, same: bool) -> str:
    """Make an article at the end of a text agree with the noun that follows it in place of the concept.

    Args:
        same: the noun is the concept's own, as the author of the text wrote it: an "an" is meant for it and stays,
            unless it is certainly wrong.
    """
    article = re.search(r"\b(a)(n?)(\s+)$", text, re.IGNORECASE)
    if not article:
        return text
    n = "n" if takes_an(noun) else ""
    if same and article[2] and not _CONSONANT.match(noun):
        n = article[2]
    return text[: article.start()] + article[1] + n + article[3]
