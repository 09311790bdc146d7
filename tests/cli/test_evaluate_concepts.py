"""scripts/evaluate_concepts.py: held-out drawings are learned, generated in every place, and recognised."""

import json
import runpy

import pytest
import torch
from helpers import ROOT, run_main
from PIL import Image

from dci.finetuning import trainer
from ldm.images import list_images, read_image, square, to_tensor
from ldm.pretraining.artwork import HELD_OUT
from ldm.pretraining.concepts import NOTO_CONCEPTS, STUDY_CONCEPTS


def test_every_held_out_drawing_is_a_concept_with_five_reference_images():
    for concepts in (STUDY_CONCEPTS, NOTO_CONCEPTS):
        assert len(concepts) == 15 and {concept.held_out for concept in concepts.values()} == set(HELD_OUT)
    for name in STUDY_CONCEPTS | NOTO_CONCEPTS:
        assert len(list((ROOT / "data/concepts" / name).glob("*.png"))) == 5


@pytest.mark.slow
def test_a_concept_is_learned_recognised_and_not_learned_twice(tmp_path):
    options = ("--concepts", "teddy", "--methods", "ico-tiny", "--steps", 1, "--device", "cpu")
    options += ("--work", tmp_path / "work", "--out", tmp_path / "found", "training.steps=1")
    run_main("evaluate_concepts.py", *options)
    first = json.loads((tmp_path / "found.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "finetune", None)  # the second time nothing is trained
        run_main("evaluate_concepts.py", *options)
    assert json.loads((tmp_path / "found.json").read_text()) == first
    found = first["concepts"]["ico-tiny"]["teddy"]
    assert found["images"] == 16 and first["means"]["ico-tiny"]["place_right"] == found["place_right"]
    assert Image.open(tmp_path / "found-ico-tiny.png").width > 18 * 64


def test_the_nearest_references_decide(monkeypatch):
    """Reference images themselves are taken for their own concept, and not for another one."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    program = runpy.run_path(str(ROOT / "scripts/evaluate_concepts.py"))
    gallery = program["reference_features"](list(STUDY_CONCEPTS))
    files = list_images(ROOT / "data/concepts/teddy")
    images = torch.stack([to_tensor(square(read_image(files[i % 5]), 64)) for i in range(16)])
    images = ((images + 1) * 127.5).round().byte()
    assert program["recognised"](images, "teddy", gallery)["right_drawing"] == 1
    assert program["recognised"](images, "boot", gallery)["right_drawing"] == 0
