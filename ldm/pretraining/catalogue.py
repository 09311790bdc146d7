"""What the wide world shows beside the 64 nouns: every drawing of a thing in the two packages, with its name.

Names and categories are those of the table `emoji.json` in emoji-datasource-google.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError

LEFT_OUT_CATEGORIES = ("Flags", "Symbols", "Component")
LEFT_OUT_GROUPS = ("emotion", "heart", "family", "person-symbol", "suit")
"""Subcategories of signs, and of people who differ by who stands beside whom."""
SCENES = (
    "foggy",
    "stars",
    "sunrise",
    "cityscape",
    "sunset",
    "bridge at night",
    "milky way",
    "moon viewing",
    "national park",
)
"""Drawings that fill their square with a place: the world has places of its own."""
SIGNS = re.compile(r"symbol|\bsign|suit\b|clock face|flag\b|cancellation|page facing|banknote|arrow|dotted line")
TABLE_COLOURS = re.compile(r"^(white|black|heavy) (?!cat|bird|flower)")
"""Old names call an outline white and a filled shape black, whatever colour the drawing has."""
SIDES = re.compile(r"^(left|right|rightwards|leftwards|front)-?(pointing|facing)? ")
REPLACED = {
    "womans ": "woman's ",
    "mans ": "man's ",
    "’": "'",
    "person: bald": "bald person",
    ": ": " with ",
    ", ": " ",
    "extraterrestrial alien": "alien",
    "electric light bulb": "light bulb",
    "aubergine": "eggplant",
    "ear of maize": "corn",
    "black telephone": "telephone",
    "pile of poo": "poo",
    "high-speed train with bullet nose": "bullet train",
}
LONGEST = 4  # words of a name; a longer one gives way to the short name


@dataclass(frozen=True)
class Entry:
    """One drawn thing: how captions call it, and the file name (code points) of its drawings."""

    name: str
    code: str


def read_catalogue(folder: str | Path) -> list[Entry]:
    """Return the things of the emoji table, in its order of code points; names may come more than once.

    Left out: flags, symbols, letters, clock faces, skin tones, hearts, families, men and women of a figure
    that is drawn without gender too, and drawings of whole scenes.

    Args:
        folder: where `scripts/fetch_artwork.sh` put the packages.

    Raises:
        UserError: the table is not there.
    """
    file = Path(folder) / "noto/emoji.json"
    if not file.is_file():
        raise UserError(f"no table of names {file}: run 'bash scripts/fetch_artwork.sh {folder}' first (needs npm)")
    rows = json.loads(file.read_text(encoding="utf-8"))
    entries = [Entry(clean_name(row), row["image"].removesuffix(".png")) for row in rows if shows_a_thing(row)]
    return sorted(entries, key=lambda entry: entry.code)


def shows_a_thing(row: dict) -> bool:
    """Return whether a row of the emoji table is a drawing of a thing that captions can name."""
    name, code = row["name"].lower(), row["image"]
    variant = "200d" in code and re.match(r"(wo)?m[ae]n\b", name)
    turned = name.endswith("facing right")
    left_out = row["category"] in LEFT_OUT_CATEGORIES or row["subcategory"] in LEFT_OUT_GROUPS
    return not (left_out or variant or turned or SIGNS.search(name) or any(word in name for word in SCENES))


def clean_name(row: dict) -> str:
    """Return how a caption calls the thing of a row: "DOG FACE" -> "dog", "BLACK SCISSORS" -> "scissors"."""
    name = _cleaned(row["name"])
    if len(name.split()) > LONGEST:
        short = row["short_name"].replace("_", " ")
        if len(short.split()) <= LONGEST:
            name = f"{short} face" if row["subcategory"].startswith("face-") and "face" not in short else short
    if row["category"] == "Animals & Nature":
        name = name.removesuffix(" face")
    return name


def _cleaned(name: str) -> str:
    name = name.lower()
    for old, new in REPLACED.items():
        name = name.replace(old, new)
    return SIDES.sub("", TABLE_COLOURS.sub("", name))
