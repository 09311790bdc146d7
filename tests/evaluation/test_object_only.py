"""CLIP-I and DINO-I of objects alone, where masks lie beside the images."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from dci.evaluation.evaluate import Scoring, ScoringObservers, evaluate_folder, load_encoders
from dci.evaluation.feature_cache import FeatureStore
from dci.evaluation.object_only import object_alone
from ldm.embedded_encoders import load_instance_encoder
from ldm.errors import UserError
from ldm.images import read_image, to_tensor

REFERENCES = ROOT / "data/concepts/cat"


@pytest.fixture
def references(tmp_path):
    """Two references, of which the first has a mask of its left half."""
    folder = tmp_path / "references"
    folder.mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(REFERENCES / name, folder / name)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:, :64] = 255
    Image.fromarray(mask).save(folder / "00.mask.png")
    return folder


def test_what_the_mask_leaves_out_is_white(references):
    seen, whole = (np.asarray(image) for image in (object_alone(references / "00.png"), read_image(references / "00.png")))
    assert (seen[:, 64:] == 255).all() and np.array_equal(seen[:, :64], whole[:, :64])
    assert np.array_equal(np.asarray(object_alone(references / "01.png")), np.asarray(read_image(references / "01.png")))
    Image.new("L", (64, 64)).save(references / "01.mask.png")
    with pytest.raises(UserError, match="64 x 64"):
        object_alone(references / "01.png")


def test_scores_of_the_object_alone(references, tmp_path):
    samples = tmp_path / "run/samples"
    samples.mkdir(parents=True)
    shutil.copy(REFERENCES / "02.png", samples / "00000.png")
    (tmp_path / "run/prompts.json").write_text(json.dumps({"00000": "a <new1> cat"}))
    said, encoders, cache = [], load_encoders(), FeatureStore(tmp_path / "f.sqlite")
    observers = ScoringObservers(report=said.append)
    whole, alone = (
        evaluate_folder(tmp_path / "run", references, encoders, Scoring(resamples=9, object_only=masks), cache, observers)
        for masks in (False, True)
    )
    pictures = [object_alone(references / "00.png"), read_image(references / "01.png"), read_image(samples / "00000.png")]
    with torch.inference_mode():
        first, second, own = load_instance_encoder().image_features(torch.stack([to_tensor(p) for p in pictures]))
    assert alone.rows[0].values["dino_i"] == pytest.approx(((first + second) @ own / 2).item(), abs=1e-5)
    assert abs(alone.rows[0].values["dino_i"] - whole.rows[0].values["dino_i"]) > 1e-3
    assert alone.rows[0].values["clip_t"] == whole.rows[0].values["clip_t"]
    words = alone.metadata.object_only
    assert words in said and "1 of 2 references, 0 of 1 generated images; the others count whole" in words
    assert whole.metadata.object_only == ""


def test_another_mask_is_another_feature(references, tmp_path):
    store, encoder = FeatureStore(tmp_path / "f.sqlite"), load_encoders().instance
    files = [references / "00.png"]
    whole, first = store.features(encoder, files), store.features(encoder, files, object_only=True)
    Image.fromarray(255 - np.asarray(Image.open(references / "00.mask.png"))).save(references / "00.mask.png")
    second = store.features(encoder, files, object_only=True)
    assert len({tuple(one[0].tolist()) for one in (whole, first, second)}) == 3
    torch.testing.assert_close(store.features(encoder, files), whole)
