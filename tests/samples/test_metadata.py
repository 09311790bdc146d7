"""What images were made with: one normal form, the differing leaf named, paths told by what they point to."""

import json
from pathlib import Path

import pytest
from helpers import POSIX

from dci.dual_branch.integration import DualBranch
from dci.samples.metadata import first_difference, normal_form


@pytest.mark.parametrize(
    "value",
    [
        {"layers": ("16", "output"), "steps": 5},
        {"nested": {"a": [(1, 2), {"b": None}]}, 3: "key"},
        {"dci": DualBranch(layers=("16",)), "file": Path("a/b")},
        {"nan": float("nan"), "small": 1e-05, "none": None},
    ],
)
def test_what_json_gives_back_is_no_difference(value):
    back = json.loads(json.dumps(normal_form(value)))
    assert first_difference(back, value) is None and first_difference(value, back) is None


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({"dci": {"layers": ["16"]}}, {"dci": {"layers": ("8",)}}, '\'dci.layers[0]\' is "16" there and "8" here'),
        ({"dci": {"layers": ["16"]}}, {"dci": {"layers": None}}, "'dci.layers' is [\"16\"] there and null here"),
        ({"dci": None}, {"dci": {"gain": 1}}, "'dci' is null there and {\"gain\": 1} here"),
        ({"a": 1}, {"a": 1, "b": {"c": 2}}, "'b' is null there and {\"c\": 2} here"),
        ({"mask_hash": "x", "mask": "a"}, {"mask_hash": "y", "mask": "a"}, '\'mask_hash\' is "x" there and "y" here'),
        ({"prompt": "a"}, {"prompt": "./a"}, '\'prompt\' is "a" there and "./a" here'),
    ],
)
def test_the_leaf_that_differs_is_named(there, here, words):
    assert str(first_difference(there, here)) == words


@pytest.mark.parametrize("name", ["loras", "concept_files", "files"])
def test_files_by_their_hashes_may_lie_elsewhere(name):
    there = {name: {"style.safetensors:0.5": "x", "/a/b": "y"}}
    assert first_difference(there, {name: {"./style.safetensors:0.5": "x", "b": "y"}}) is None
    assert first_difference({name: {"a": "x"}}, {name: {"b:1": "x"}}) is None
    for other in (
        {"style.safetensors:0.6": "x", "/a/b": "y"},
        {"style.safetensors:0.5": "z", "/a/b": "y"},
        {"/a/b": "y"},
        None,
    ):
        assert first_difference(there, {name: other}).name.startswith(name)


@POSIX
def test_paths_are_what_they_point_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.safetensors").touch()
    (tmp_path / "link").symlink_to("c.safetensors")
    for other in ("./c.safetensors", str(tmp_path / "c.safetensors"), "link"):
        assert first_difference({"concept": "c.safetensors"}, {"concept": other}) is None
    assert first_difference({"concept": "c.safetensors"}, {"concept": "d.safetensors"})
    # Where the hashes are known they decide, wherever the files lie now.
    there = {"concept": "gone/c", "concept_hash": "x", "model": "m", "checkpoint": "old", "model_hash": "y"}
    assert first_difference(there, there | {"concept": "c", "model": "n", "checkpoint": "new"}) is None
    assert first_difference({"mask": None, "mask_hash": None}, {"mask": "a", "mask_hash": "x"}).name == "mask"
