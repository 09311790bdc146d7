"""What the tab asks for, and the command and the Python that ask for the same."""

import ast
import shlex
import sys
import warnings
from pathlib import Path

import pytest

from dci.app.shelf import Entry
from dci.app.studio import Weights
from dci.app.wanted import Wanted, command, python
from dci.cli import sample_dci
from dci.cli.branches import warn_of_no_effect
from ldm.errors import UserError

ENTRY = Entry("demo:cat", "cat", Path("/runs/my cat/concept.safetensors"))


def wanted(prompt="a V* cat on the beach", agg_lambda=-0.5, noun="", n=2):
    return Wanted.of(prompt, 0.3, agg_lambda, noun, 6, 20, "ddim", 7, n)


def parsed(line, monkeypatch):
    """The arguments that the program makes of a command."""
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", ["sample", *words[words.index("--concept") :]])
    return sample_dci.arguments()


@pytest.mark.parametrize(
    "prompt", ["a V* cat on the beach", "--no-dci V*", 'it\'s "V*" $HOME `x`', "-0.5 V*", "V*\n\nünïcode 猫"]
)
def test_the_command_means_what_was_wanted(prompt, monkeypatch):
    args = parsed(command(wanted(prompt, noun="-kitten"), ENTRY, Weights()), monkeypatch)
    assert args.prompt == prompt and args.auxiliary_noun == "-kitten"
    assert args.concept == [str(ENTRY.file)] and not args.no_dci
    given = (args.n_samples, args.seed, args.steps, args.scale, args.solver, args.agg_time, args.agg_lambda)
    assert given == (2, 7, 20, 6.0, "ddim", 0.3, -0.5)


def test_the_plain_command_and_the_model_that_the_page_was_started_with(monkeypatch):
    weights = Weights("configs/model/sd-v1.yaml", "some.ckpt", "vae.safetensors")
    entry = Entry("upload:1", "lora", Path("/x.safetensors"), "dog", "sks")
    args = parsed(command(wanted(), entry, weights, dci=False), monkeypatch)
    assert args.no_dci and (args.model, args.checkpoint, args.vae) == (
        "configs/model/sd-v1.yaml",
        "some.ckpt",
        "vae.safetensors",
    )
    assert (args.class_noun, args.trigger) == ("dog", "sks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_no_effect(args)


def test_the_python_is_python_and_names_the_same_settings():
    text = python(wanted("a 'V*' \\ cat"), ENTRY, Weights())
    tree = ast.parse(text)
    named = {word.arg: ast.literal_eval(word.value) for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg}
    assert named == {
        "n": 2,
        "seed": 7,
        "steps": 20,
        "scale": 6.0,
        "solver": "ddim",
        "agg_time": 0.3,
        "agg_lambda": -0.5,
        "dci": False,
    }
    assert "a 'V*' \\ cat" in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({3: "x" * 3000}, "shorten"),
        ({5: 100000}, "steps 100000"),
        ({5: 0}, "steps 0"),
        ({8: 99}, "images 99"),
        ({7: None}, "missing"),
        ({1: "many"}, "missing"),
        ({5: float("inf")}, "missing"),
    ],
)
def test_what_nobody_should_wait_for_is_refused(changed, words):
    fields = ["a V*", 0.3, 0, "", 6, 20, "ddim", 0, 1]
    for place, value in changed.items():
        fields[place] = value
    with pytest.raises(UserError, match=words):
        Wanted.of(*fields)
