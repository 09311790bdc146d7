"""English around a concept's noun, in prompts as they are typed."""

import pytest

from dci.concept.modifier_tokens import ConceptName
from dci.concept.nouns import plurals, takes_an
from dci.concept.prompts import negative_ids, parse_prompt
from ldm import tokenizer
from ldm.errors import UserError

TWO = ("<new1>", "<new2>")


def parsed(prompt, noun, auxiliary=None):
    return parse_prompt(prompt, ConceptName(TWO, noun), auxiliary)


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("dog", "dogs"),
        ("puppy", "puppies"),
        ("toy", "toys"),
        ("wolf", "wolves"),
        ("knife", "knives"),
        ("scarf", "scarfs"),
        ("child", "children"),
        ("mouse", "mice"),
        ("goose", "geese"),
        ("person", "people"),
        ("woman", "women"),
        ("fireman", "firemen"),
        ("sheep", "sheep"),
        ("bus", "buses"),
        ("fox", "foxes"),
        ("watch", "watches"),
        ("tomato", "tomatoes"),
        ("cactus", "cacti"),
        ("cactus", "cactuses"),
        ("teddy bear", "teddy bears"),
        ("tortoise plushy", "tortoise plushies"),
        ("Puppy", "PUPPIES"),
    ],
)
def test_plurals_are_the_concepts_noun(noun, many):
    prompt = parsed(f"two V* {many} here", noun)
    assert prompt.concept.lower() == f"two <new1> <new2> {many} here".lower()
    assert prompt.auxiliary.lower() == f"two {many} here".lower()
    assert len(prompt.auxiliary_positions) == len(tokenizer.tokenize(many))


@pytest.mark.parametrize(("noun", "other", "many"), [("dog", "puppy", "puppies"), ("child", "wolf", "wolves")])
def test_an_auxiliary_noun_comes_in_the_same_number(noun, other, many):
    assert parsed(f"two V* {plurals(noun)[0]}", noun, other).auxiliary == f"two {many}"
    assert parsed(f"a V* {noun}", noun, other).auxiliary == f"a {other}"


@pytest.mark.parametrize("word", ["catfish", "catty", "cat5"])
def test_longer_words_are_not_the_noun(word):
    assert parsed(f"a V* {word}", "cat").concept == f"a <new1> <new2> cat {word}"


@pytest.mark.parametrize("noun", ["teddy bear", "teddy-bear", "teddy_bear"])
@pytest.mark.parametrize("written", ["teddy  bear", "teddy-bear", "teddybear", "teddy_bear", "TEDDY Bear", "teddy\tbear"])
def test_other_spellings_of_two_words(noun, written):
    found, expected = parsed(f"a V* {written} here", noun), parsed(f"a V* {noun} here", noun)
    assert found.concept_ids == expected.concept_ids
    assert found.auxiliary_ids == expected.auxiliary_ids


@pytest.mark.parametrize(
    ("noun", "alone"),
    [
        ("a dog", "dog"),
        ("the red car", "red car"),
        ("An owl", "owl"),
        ("V* dog", "dog"),
        ("{} dog", "dog"),
        ("photo of a dog", "dog"),
        ("image of dog", "dog"),
        ("<new1> dog", "dog"),
        ("my dog", "dog"),
    ],
)
def test_a_phrase_is_no_noun(noun, alone):
    with pytest.raises(UserError, match=f"is a phrase: give the ordinary word alone, such as {alone}$"):
        parsed("a V*", noun)


@pytest.mark.parametrize(
    ("prompt", "noun", "auxiliary", "expected"),
    [
        ("a V* unicorn", "unicorn", None, "a unicorn"),
        ("an V* hourglass", "hourglass", None, "an hourglass"),
        ("a V*", "hourglass", None, "an hourglass"),
        ("an V* herb", "herb", None, "an herb"),  # as its author says it
        ("a V* owl", "owl", None, "an owl"),
        ("a V* dog", "dog", "a plushy toy", "a plushy toy"),
        ("a V* dog", "dog", "an elephant", "an elephant"),
        ("the V* dog", "dog", "the elephant", "the elephant"),
        ("An V* apple", "apple", "pear", "A pear"),
        ("a V* cat", "cat", "SUV", "an SUV"),
        ("a V* cat", "cat", "UFO", "a UFO"),
    ],
)
def test_articles(prompt, noun, auxiliary, expected):
    assert parsed(prompt, noun, auxiliary).auxiliary == expected


@pytest.mark.parametrize(
    ("noun", "an"),
    [
        ("apple", True),
        ("umbrella", True),
        ("uninvited guest", True),
        ("urn", True),
        ("heirloom", True),
        ("8-ball", True),
        ("university", False),
        ("unicycle", False),
        ("ukulele", False),
        ("user", False),
        ("european", False),
        ("ewe", False),
        ("one-eyed cat", False),
        ("onesie", False),
        ("house", False),
        ("yacht", False),
    ],
)
def test_which_article_by_the_sound(noun, an):
    assert takes_an(noun) is an


def test_a_negative_prompt_names_the_concept_or_does_not():
    name = ConceptName(TWO, "dog")
    assert negative_ids("blurry", name) is None
    assert negative_ids("", name) is None
    for prompt in ("V*", "{} dog", "<new1> <new2>"):
        assert negative_ids(prompt, name) == parsed("V*", "dog").concept_ids
    with pytest.raises(UserError, match="does not name the concept"):
        negative_ids("V2*", name)
