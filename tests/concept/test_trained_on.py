"""What a concept's configuration says of its base model and images, in every form that files have it."""

import pytest
from helpers import ROOT

from dci.concept.trained_on import TrainedOn

TINY = str(ROOT / "configs/model/tiny.yaml")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, TrainedOn()),
        ({"model": "m", "checkpoint": None, "loras": [], "data": {"images": "cat"}}, TrainedOn("m", images=("cat",))),
        (
            {
                "model": "m",
                "checkpoint": "c",
                "vae": "v",
                "loras": ["a"],
                "concepts": [{"images": "x"}, {"images": "y"}],
            },
            TrainedOn("m", "c", "v", ("a",), ("x", "y")),
        ),
        ({"concepts": [], "data": {"images": "cat"}}, TrainedOn(images=("cat",))),
        ({"concepts": [{"class_noun": "cat"}], "data": {"images": "dog"}}, TrainedOn()),
        ({"model": 3, "loras": None, "data": None, "vae": ""}, TrainedOn()),
    ],
)
def test_a_configuration_is_read(config, found):
    assert TrainedOn.of(config) == found


@pytest.mark.parametrize(
    ("trained", "checkpoint", "expected"),
    [
        (TrainedOn(TINY, "own"), None, (TINY, "own")),
        (TrainedOn(TINY, "own"), "asked", (TINY, "asked")),
        (TrainedOn("/gone/model.yaml", "own"), None, ("embedded", None)),
        (TrainedOn("/gone/model.yaml", "own"), "asked", ("asked", None)),
        (TrainedOn(), None, ("embedded", None)),
    ],
)
def test_the_base_is_the_concepts_own_where_it_is_there(trained, checkpoint, expected):
    assert trained.base(checkpoint, "embedded") == expected
