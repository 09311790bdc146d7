"""Prompt parsing: both branches' prompts, positions and lengths; impossible prompts."""

import re

import pytest
import torch
from helpers import SHARED

from dci.concept.modifier_tokens import ConceptName, initial_embeddings, modifier_names
from dci.concept.prompts import parse_prompt
from ldm import tokenizer
from ldm.errors import UserError
from ldm.tokenizer import VOCAB_SIZE

TWO = ("<new1>", "<new2>")


def test_the_readme_example():
    """The numbers that users of the published script work out by hand."""
    p = parse_prompt("a V* dog in times square", ConceptName(TWO, "dog"))
    assert p.concept == "a <new1> <new2> dog in times square"
    assert p.auxiliary == "a dog in times square"
    assert p.concept_positions == (1, 2, 3)
    assert p.auxiliary_positions == (1,)
    assert (p.concept_length, p.auxiliary_length) == (8, 6)


@pytest.mark.parametrize(
    "prompt",
    [
        "a V* dog on the beach",
        "a {} dog on the beach",
        "a <new1> <new2> dog on the beach",
        "a V* on the beach",
        "a {} on the beach",
        "a <new1> <new2> on the beach",
        "a v* DOG on the beach",
        "a <NEW1><new2> dog on the beach",
    ],
)
def test_every_way_to_write_the_concept(prompt):
    expected, p = (parse_prompt(text, ConceptName(TWO, "dog")) for text in ("a V* dog on the beach", prompt))
    assert p.concept_ids == expected.concept_ids
    assert p.auxiliary_ids == expected.auxiliary_ids
    assert p.concept_positions == expected.concept_positions


def test_ids_are_those_of_the_whole_texts():
    """Tokenizing piece by piece gives what open_clip's own tokenizer gives for the auxiliary text."""
    open_clip = pytest.importorskip("open_clip")
    p = parse_prompt("photo of a V* dog's café, by the sea!", ConceptName(TWO, "dog"), "sea otter")
    assert p.auxiliary == "photo of a sea otter's café, by the sea!"
    theirs = open_clip.SimpleTokenizer().encode(p.auxiliary)
    assert list(p.auxiliary_ids[1 : 1 + len(theirs)]) == theirs
    assert p.auxiliary_ids[0] == tokenizer.START
    assert set(p.auxiliary_ids[1 + len(theirs) :]) == {tokenizer.END}
    assert p.auxiliary_length == len(theirs) + 1
    named = [p.auxiliary_ids[1 + i] for i in p.auxiliary_positions]
    assert named == open_clip.SimpleTokenizer().encode("sea otter")


def test_an_article_agrees_with_the_auxiliary_noun():
    assert parse_prompt("a V* dog here", ConceptName(TWO, "dog"), "elephant").auxiliary == "an elephant here"
    assert parse_prompt("An V* apple here", ConceptName(TWO, "apple"), "pear").auxiliary == "A pear here"
    assert parse_prompt("A V* here", ConceptName(TWO, "owl")).auxiliary == "An owl here"
    assert parse_prompt("a <new1> owl", ConceptName(("<new1>",), "owl")).concept == "a <new1> owl"


def test_plural_possessive_and_punctuation():
    assert parse_prompt("two V* dogs", ConceptName(TWO, "dog")).concept == "two <new1> <new2> dogs"
    assert parse_prompt("V*, sitting", ConceptName(TWO, "dog")).concept == "<new1> <new2> dog, sitting"
    assert parse_prompt("V*'s house", ConceptName(TWO, "dog")).auxiliary == "dog's house"
    assert parse_prompt("the dog and V* dogma", ConceptName(TWO, "dog")).concept == "the dog and <new1> <new2> dog dogma"


def test_a_concept_named_twice_counts_twice():
    p = parse_prompt("a V* dog and its mirror image, a V* dog", ConceptName(TWO, "dog"))
    assert len(p.concept_positions) == 6
    assert len(p.auxiliary_positions) == 2


def dreambench():
    file = SHARED / "dreambench/dataset/prompts_and_classes.txt"
    if not file.is_file():
        return []
    text = file.read_text()
    prompts = sorted(set(re.findall(r"'(a .*?)'\.format", text)))
    classes = sorted({line.split(",")[1] for line in text.splitlines() if re.fullmatch(r"\w+,[\w ]+", line)} - {"class"})
    return [(prompt, noun) for prompt in prompts for noun in classes]


@pytest.mark.skipif(not dreambench(), reason="the DreamBench prompts are not there")
def test_dreambench_prompts():
    open_clip = pytest.importorskip("open_clip").SimpleTokenizer()
    cases = dreambench()
    assert len(cases) > 300
    for prompt, noun in cases:
        p = parse_prompt(prompt.format("V*", noun), ConceptName(TWO, noun))
        plain = prompt.format("", noun).replace("  ", " ")
        assert open_clip.encode(p.auxiliary) in (
            open_clip.encode(plain),
            open_clip.encode(re.sub(r"\ba (?=[aeiou])", "an ", plain)),
        )
        size = len(open_clip.encode(noun))
        start = p.auxiliary_positions[0]
        assert p.auxiliary_positions == tuple(range(start, start + size))
        assert p.concept_positions == tuple(range(start, start + size + 2))
        assert p.concept_length == p.auxiliary_length + 2


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a dog on the beach", "does not name the concept"),
        ("", "does not name the concept"),
        ("   ", "does not name the concept"),
        ("a <new1> dog", "does not name the concept"),
        ("a <new3> dog with V*", "has '<new3>'"),
        ("a superV* dog", "part of another word"),
        ("a V*ish dog", "part of another word"),
        ("a {0} dog", "does not name the concept"),
        ("a V* dog and a {1}", "has '{1}'"),
        ("a V* dog " + "very " * 80, "only 75 fit"),
        ("very " * 80 + "V*", "only 75 fit"),
        ("a V* dog\x00", "NUL"),
    ],
)
def test_impossible_prompts(prompt, reason):
    with pytest.raises(UserError) as error:
        parse_prompt(prompt, ConceptName(TWO, "dog"))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_noun():
    with pytest.raises(UserError, match="noun is empty"):
        parse_prompt("a V*", ConceptName(TWO, "dog"), "  ")


@pytest.mark.parametrize(
    "text",
    ["a photo of a dog", "It's 12 o'clock -- café ünïcödé!", "日本語 🐶 x", "<new1> V* {}", "tabs\tand\nlines", "(((("],
)
def test_tokenizer_equals_open_clip(text):
    open_clip = pytest.importorskip("open_clip")
    assert tokenizer.tokenize(text) == open_clip.SimpleTokenizer().encode(" ".join(text.split()).lower())


def test_rare_tokens_have_their_known_ids():
    table = torch.arange(tokenizer.VOCAB_SIZE)[:, None]
    assert initial_embeddings(["ktn", "pll", "ucd", "dog"], table)[:, 0].tolist() == [42170, 47629, 43514, 1929]


@pytest.mark.parametrize("word", ["", "two words", "xyzzyplugh"])
def test_a_modifier_token_starts_from_one_token(word):
    with pytest.raises(UserError, match="tokens"):
        initial_embeddings([word], torch.zeros(tokenizer.VOCAB_SIZE, 1))


@pytest.mark.parametrize("number", [0, 4])
def test_one_to_three_modifier_tokens(number):
    with pytest.raises(UserError, match="1 to 3"):
        modifier_names(number)


def test_several_concepts_in_one_prompt():
    several = (ConceptName(("<new1>", "<new2>"), "dog"), ConceptName(("<new3>",), "red car"))
    first, (dog,) = VOCAB_SIZE, tokenizer.tokenize("dog")
    expected = None
    for prompt in ("a V1* dog in a V2* red car", "a {0} in a {1} red car", "a <new1> <new2> dog in a <new3>"):
        parsed = parse_prompt(prompt, several)
        assert parsed.concept == "a <new1> <new2> dog in a <new3> red car"
        assert parsed.auxiliary == "a dog in a red car"
        assert parsed.concept_ids[2:5] == (first, first + 1, dog)
        assert parsed.concept_ids[7:10] == (first + 2, *tokenizer.tokenize("red car"))
        assert parsed.concept_positions == (1, 2, 3, 6, 7, 8)
        assert parsed.auxiliary_positions == (1, 4, 5)
        assert expected in (None, parsed)
        expected = parsed
    # One of them alone has its own token.
    assert parse_prompt("a V2*", several).concept_ids[2] == first + 2
    refused = {"a dog": "write V1[*], V2[*] or", "a V* dog": "does not name", "a V1* and V*": "has 'V[*]'"}
    for prompt, reason in refused.items():
        with pytest.raises(UserError, match=reason):
            parse_prompt(prompt, several)
    with pytest.raises(UserError, match="one auxiliary noun"):
        parse_prompt("a V1*", several, "toy")
