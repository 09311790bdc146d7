"""Options as the programs read them: several values given at once or again."""

import argparse
import sys

import pytest
from helpers import refused, run_here

from dci.cli import evaluate
from dci.cli.arguments import (
    Parser,
    above_zero,
    add_sampling_options,
    image_file,
    number,
    port,
    positive,
    sampling_arguments,
    seed,
    share,
    whole_numbers,
)
from dci.cli.branches import add_dci_options, warn_of_no_effect
from dci.cli.loading import add_concept_options
from ldm.errors import Note


def parsed(*args):
    parser = Parser()
    add_concept_options(parser)
    add_sampling_options(parser)
    return parser.parse_args(["--concept", "c", *args])


@pytest.mark.parametrize(
    "given", [("--concept", "a", "b"), ("--concept", "a", "--concept", "b"), ("--concept=a", "--concept=b")]
)
def test_files_of_a_concept_are_given_at_once_or_one_by_one(given):
    parser = Parser()
    add_concept_options(parser)
    assert parser.parse_args([*given, "--class-noun", "dog"]).concept == ["a", "b"]


def test_folders_to_evaluate_are_given_at_once_or_one_by_one(monkeypatch):
    given = ["--samples", "a", "x=b", "--references", "r", "--samples", "c", "--references", "s", "--class-noun", "dog"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given, "--class-noun", "cat", "--out", "o"])
    args = evaluate.arguments()
    assert (args.samples, args.references, args.class_noun) == (["a", "x=b", "c"], ["r", "s"], ["dog", "cat"])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--samples", "a", "--out", "o"])
    assert (evaluate.arguments().references, evaluate.arguments().class_noun) == (None, [])


@pytest.mark.parametrize(
    ("given", "first"), [(("--seed", 2**32), 2**32), (("--seed", 2**64), 2**64), (("--seeds", f"{2**40},7"), 2**40)]
)
def test_every_seed_is_taken(given, first):
    assert sampling_arguments(parsed(*map(str, given)))["seed"] == first


@pytest.mark.parametrize("given", ["0-99999999999999", "1,2-9999999", "0-1000000"])
def test_more_seeds_than_anybody_samples_are_refused_at_once(given, capsys):
    with pytest.raises(SystemExit):
        parsed("--seeds", given)
    assert "expected at most 1,000,000 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--checkpoint", "--vae", "--lora", "--outdir", "--from-file", "--concept"])
@pytest.mark.parametrize("given", [["OPTION", ""], ["OPTION="]], ids=["apart", "together"])
def test_an_empty_value_is_not_taken_for_none(option, given, capsys):
    """As a shell gives it in place of a variable that is not set."""
    with pytest.raises(SystemExit):
        parsed(*(part.replace("OPTION", option) for part in given))
    assert f"argument {option}: it is empty" in capsys.readouterr().err
    assert parsed("--negative-prompt", "", "--prompt", "").negative_prompt == ""


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--n-samples", "abc: expected a whole number from 1 on"),
        ("--seed", "abc: expected a whole number from 0 on, or -1 for any"),
        ("--seeds", "abc: expected whole numbers from 0 on"),
        ("--scale", "abc: expected a finite number"),
        ("--shard", "abc: expected K/N"),
    ],
)
def test_what_is_no_number_is_told_what_is_expected(option, words, capsys):
    with pytest.raises(SystemExit):
        parsed(option, "abc")
    assert capsys.readouterr().err.startswith(f"error: argument {option}: {words}")


@pytest.mark.parametrize("reader", [number, above_zero, positive, port, seed, whole_numbers, share])
@pytest.mark.parametrize("text", ["abc", "", "1.5.2", "nan"])
def test_readers_of_numbers_say_what_they_expect(reader, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected "):
        reader(text)


@pytest.mark.parametrize("given", ["s.foo", "s", ".", "s.txt"])
def test_what_is_no_name_of_an_image_is_refused_before_work(given, capfd, tmp_path):
    refused(run_here(capfd, "contact_sheet.py", tmp_path, "--out", given), f"--out: {given}: expected a file's name", ".png")
    assert [image_file(f"sheet{ending}") for ending in (".png", ".JPG", ".webp")]


@pytest.mark.parametrize(
    ("given", "notes"),
    [
        (["--no-dci"], []),
        (["--agg-time", "0.4", "--clip", "tiny", "--auxiliary-noun", "auto"], []),
        (["--no-dci", "--agg-time", "0"], ["--agg-time has no effect with --no-dci, which is plain sampling"]),
        (
            ["--no-dci", "--gain", "2", "--shared-noise", "--auxiliary-noun", "cat"],
            ["--gain and --shared-noise and --auxiliary-noun have no effect with --no-dci, which is plain sampling"],
        ),
        (["--clip", "tiny"], ["--clip has no effect without --auxiliary-noun auto"]),
    ],
)
def test_options_of_dci_without_effect_get_a_note(given, notes, recwarn):
    parser = Parser()
    add_dci_options(parser)
    warn_of_no_effect(parser.parse_args(given))
    assert [str(warning.message) for warning in recwarn if warning.category is Note] == notes


def test_of_an_option_of_one_value_the_last_counts():
    assert parsed("--steps", "3", "--ddim_steps", "4", "--steps=5").steps == 5
    assert parsed("--lora", "a", "--lora", "b:0.5").lora == ["a", "b:0.5"]
