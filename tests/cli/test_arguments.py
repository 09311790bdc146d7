"""Options as the programs read them: several values given at once or again."""

import sys

import pytest

from dci.cli import evaluate
from dci.cli.arguments import Parser, add_sampling_options, sampling_arguments
from dci.cli.loading import add_concept_options


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
    ("given", "seed"), [(("--seed", 2**32), 2**32), (("--seed", 2**64), 2**64), (("--seeds", f"{2**40},7"), 2**40)]
)
def test_every_seed_is_taken(given, seed):
    assert sampling_arguments(parsed(*map(str, given)))["seed"] == seed


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


def test_of_an_option_of_one_value_the_last_counts():
    assert parsed("--steps", "3", "--ddim_steps", "4", "--steps=5").steps == 5
    assert parsed("--lora", "a", "--lora", "b:0.5").lora == ["a", "b:0.5"]
