"""The wide world: which drawings it shows, what captions call them, and that nothing held out is in it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.pretraining.artwork import COLOURS, HELD_OUT, NOUNS, PAINTED, load_artwork, wide_drawings
from ldm.pretraining.cache import world_digest
from ldm.pretraining.catalogue import clean_name, read_catalogue, shows_a_thing
from ldm.pretraining.concepts import CONCEPTS
from ldm.pretraining.config import WorldConfig
from ldm.pretraining.world import render, with_article


def row(name, code="1f40a", short_name=None, category="Animals & Nature", subcategory="animal"):
    short_name = short_name or name.lower().replace(" ", "_")
    facts = {"category": category, "subcategory": subcategory}
    return {"name": name, "image": f"{code}.png", "short_name": short_name, **facts}


TABLE = [
    row("CROCODILE", "1f40a"),
    row("DOG FACE", "1f436"),
    row("DOG", "1f415"),
    row("CAT", "1f408"),
    row("BLACK CAT", "1f408-200d-2b1b"),
    row("POODLE", "1f429"),
    row("TEDDY BEAR", "1f9f8", category="Activities", subcategory="game"),
    row("BLACK SCISSORS", "2702-fe0f", category="Objects", subcategory="office"),
    row("GREEN APPLE", "1f34f", category="Food & Drink", subcategory="food-fruit"),
    row("FRANCE FLAG", "1f1eb-1f1f7", category="Flags", subcategory="country-flag"),
    row("CLOCK FACE TWO OCLOCK", "1f551", category="Travel & Places", subcategory="time"),
    row("INPUT SYMBOL FOR LATIN LETTERS", "1f524", category="Symbols", subcategory="alphanum"),
    row("EMOJI MODIFIER FITZPATRICK TYPE-3", "1f3fc", category="Component", subcategory="skin-tone"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both packages with made-up drawings of the table's things and of all nouns."""
    folder = tmp_path_factory.mktemp("artwork")
    codes = {row["image"].removesuffix(".png") for row in TABLE} | set(NOUNS.values()) | {c for _, c in HELD_OUT.values()}
    sprite = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8), "RGBA")
    for part, extension in (("fluent/assets", "webp"), ("noto/img/google/64", "png")):
        (folder / part).mkdir(parents=True)
        for code in codes:
            sprite.save(folder / part / f"{code}.{extension}")
    (folder / "noto/emoji.json").write_text(json.dumps(TABLE))
    return folder


@pytest.mark.parametrize(
    ("name", "facts", "expected"),
    [
        ("DOG FACE", {}, "dog"),
        ("BLACK SCISSORS", {"category": "Objects"}, "scissors"),
        ("BLACK CAT", {}, "black cat"),
        ("LEFT-POINTING MAGNIFYING GLASS", {"category": "Objects"}, "magnifying glass"),
        ("MAN: BEARD", {"category": "People & Body"}, "man with beard"),
        ("PERSON: BALD", {"category": "People & Body"}, "bald person"),
        ("GRINNING FACE", {"category": "Smileys & Emotion"}, "grinning face"),
        ("WOMANS HAT", {"category": "Objects"}, "woman's hat"),
        (
            "SMILING FACE WITH OPEN MOUTH AND COLD SWEAT",
            {"category": "Smileys & Emotion", "subcategory": "face-smiling", "short_name": "sweat_smile"},
            "sweat smile face",
        ),
    ],
)
def test_names_are_cleaned_for_captions(name, facts, expected):
    assert clean_name(row(name) | facts) == expected


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("FRANCE FLAG", {"category": "Flags"}),
        ("SAGITTARIUS", {"category": "Symbols"}),
        ("EMOJI MODIFIER FITZPATRICK TYPE-3", {"category": "Component"}),
        ("CLOCK FACE TWO OCLOCK", {"category": "Travel & Places"}),
        ("WOMAN RUNNING", {"category": "People & Body", "image": "1f3c3-200d-2640-fe0f.png"}),
        ("PERSON RUNNING FACING RIGHT", {"category": "People & Body"}),
        ("BLUE HEART", {"subcategory": "heart"}),
        ("FAMILY", {"subcategory": "family"}),
        ("SUNRISE OVER MOUNTAINS", {"category": "Travel & Places"}),
        ("NO SMOKING SIGN", {"category": "Objects"}),
    ],
)
def test_signs_and_variants_are_left_out(name, facts):
    assert not shows_a_thing(row(name) | facts)


@pytest.mark.parametrize("name", ["CROCODILE", "WOMAN", "SUNFLOWER", "STARFISH", "DESIGNER"])
def test_things_stay(name):
    assert shows_a_thing(row(name))


def test_what_is_held_out_is_not_in_the_wide_world(folder):
    nouns, others = wide_drawings(folder)
    files = [file for group in (nouns, others) for drawings in group.values() for file in drawings]
    reserved = {code.removesuffix("-fe0f") for _, code in HELD_OUT.values()}
    assert not [file for file in files if any(file.stem.startswith(code) for code in reserved)]
    assert not {"poodle", "teddy bear", "cat", "black cat"} & others.keys()  # names without another drawing
    assert set(PAINTED) == {concept.noun for concept in CONCEPTS.values() if concept.held_out is None}
    for noun in PAINTED:
        assert [file.suffix for file in nouns[noun]] == [".png"]  # the Fluent drawing is under the demo concept
    assert others.keys() == {"crocodile", "dog", "scissors", "green apple"}
    assert len(files) == 2 * 64 - len(PAINTED) + 2 * 4


@pytest.mark.slow
def test_captions_of_the_wide_world(folder):
    """Half of the subjects are nouns; every caption names what it shows; a coloured name gets no second colour."""
    artwork = load_artwork(folder, wide=True)
    seen = [render(artwork, 0, i) for i in range(300)]
    single = [item for item in seen if item.noun and not item.second]
    share = sum(item.noun in NOUNS for item in single) / len(single)
    assert 0.5 < share < 0.75  # of the four other names one is a noun too, the dog
    for item in single:
        assert re.search(rf"\b{item.noun}\b", item.caption), item.caption
        assert not re.search(rf"({'|'.join(COLOURS)}) green apple", item.caption)
    assert any(re.search(rf"({'|'.join(COLOURS)}) and ({'|'.join(COLOURS)}) ", item.caption) for item in seen)
    assert any(item.caption.startswith("a close view of") for item in seen)
    again = render(artwork, 0, 7)
    assert np.array_equal(np.asarray(again.image), np.asarray(seen[7].image))


def test_the_64_nouns_are_rendered_as_before(folder):
    """The narrow world has not changed: what the first two sittings saw, and data/tiny/held-out.webp, come out again."""
    narrow = load_artwork(folder)
    captions = [render(narrow, 1, i).caption for i in (2, 8, 14, 20, 26)]
    assert captions == [
        "a mushroom at the lake",
        "the big banana in the kitchen",
        "photo of a white apple in the kitchen.",
        "the small red butterfly in the kitchen.",
        "a sunflower in a kitchen",
    ]


def test_worlds_have_caches_of_their_own(folder, tmp_path):
    wide, narrow = (world_digest(WorldConfig(wide=flag), folder) for flag in (True, False))
    assert wide != narrow
    table = [row for row in TABLE if row["name"] != "CROCODILE"]
    (tmp_path / "noto").mkdir()
    (tmp_path / "noto/emoji.json").write_text(json.dumps(table))
    assert world_digest(WorldConfig(wide=True), tmp_path) != wide
    assert world_digest(WorldConfig(), tmp_path) == narrow


def test_articles():
    names = ["owl", "car", "unicorn", "european castle", "hourglass", "x-ray", "jeans", "bus", "octopus", "compass"]
    assert [with_article(name) for name in names] == [
        "an owl",
        "a car",
        "a unicorn",
        "a european castle",
        "an hourglass",
        "an x-ray",
        "jeans",
        "a bus",
        "an octopus",
        "a compass",
    ]


def test_a_missing_table_of_names(tmp_path):
    with pytest.raises(UserError, match="fetch_artwork.sh"):
        read_catalogue(tmp_path)
