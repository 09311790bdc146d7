"""Keys and values trained as changes of low rank on a model of Stable Diffusion 1.x's shape: resumed, merged, exported."""

import shutil

import pytest
import torch
from helpers import ROOT, refused, run_here, run_main
from safetensors.torch import load_file

from dci.concept.concept_file import Concept
from dci.concept.foreign.layers import Layers
from ldm.checkpoint import load_model

pytestmark = pytest.mark.slow

RANK = 3
CONFIG = ("--config", ROOT / "configs/train/ico-tiny.yaml")
QUIET = ("--device", "cpu", "validation.every=0", "logging.tensorboard=false")
STEPS = ("training.batch_size=2", "training.steps=4", "training.checkpoint_every=2", "training.learning_rate=1e-3")
SHORT = (*QUIET, *STEPS, f"training.lora_rank={RANK}")
DRAWN = ("--prompt", "a V1* and a V2*", "--steps", 2, "--n-samples", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two concepts' runs."""
    folders = []
    for name in ("cat", "car"):
        logdir = tmp_path_factory.mktemp(name)
        own = (f"concept.class_noun={name}", f"data.images={ROOT}/data/concepts/{name}")
        run_main("train_ico.py", *CONFIG, "--logdir", logdir, *SHORT, *own)
        folders += logdir.iterdir()
    return folders


def test_the_concept_is_of_low_rank_and_changes_the_model(runs, tiny_base):
    concept = Concept.load(runs[0] / "concept.safetensors")
    assert not concept.keys_values
    assert {tuple(change.v.shape)[0] for change in concept.low_rank.values()} == {RANK}
    assert len(concept.low_rank) == sum(".attn2.to_k." in name or ".attn2.to_v." in name for name in tiny_base.state_dict())
    weights = concept.weights(tiny_base)
    assert all((weight - tiny_base.state_dict()[name]).abs().max() > 0 for name, weight in weights.items())


def test_a_run_goes_on_bitwise(runs, tmp_path):
    part = shutil.copytree(runs[0], tmp_path / runs[0].name)
    for file in (part / "concept.safetensors", part / "checkpoints/step-000004.ckpt"):
        file.unlink()
    run_main("train_ico.py", "--resume", part, "--device", "cpu")
    ours, theirs = (load_file(folder / "concept.safetensors") for folder in (part, runs[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_of_them_are_merged_and_sampled(runs, tmp_path):
    run_main("merge_concepts.py", *(run / "concept.safetensors" for run in runs), "--out", tmp_path / "both.safetensors")
    both = Concept.load(tmp_path / "both.safetensors")
    assert [name.class_noun for name in both.names] == ["cat", "car"]
    assert both.low_rank and not both.keys_values
    run_main("sample_dci.py", "--concept", tmp_path / "both.safetensors", *DRAWN, "--outdir", tmp_path)
    assert (tmp_path / "samples/00000.png").is_file()


def test_a_lora_of_it_is_exact_at_its_own_rank(runs, tmp_path):
    """The factors themselves, not the change of a whole weight: W + up down alpha / rank is the concept's weight."""
    file = runs[0] / "concept.safetensors"
    run_main("export_concept.py", file, "--to", "lora", "--out", tmp_path)
    tensors, model = load_file(tmp_path / "mycat-lora.safetensors"), load_model(ROOT / "configs/model/tiny.yaml")
    expected = Concept.load(file).weights(model)
    for kohya, place in Layers.of(model.config).kohya.items():
        if f"{kohya}.alpha" in tensors:
            down, up = (tensors.pop(f"{kohya}.lora_{part}.weight").float() for part in ("down", "up"))
            assert len(down) == RANK
            weight = model.state_dict()[place.weight] + tensors.pop(f"{kohya}.alpha") / RANK * up @ down
            change = expected[place.weight] - model.state_dict()[place.weight]
            assert (weight - expected.pop(place.weight)).norm() < 1e-3 * change.norm()
    assert not tensors and not expected


def test_what_a_rank_does_not_go_with(tmp_path, capfd):
    def train(*options):
        config = ("--config", ROOT / "configs/train/ico-tiny.yaml", "--logdir", tmp_path)
        return run_here(capfd, "train_ico.py", *config, *SHORT, *options)

    refused(train("training.trainable=crossattn"), "training.lora_rank=3", "training.trainable=crossattn-kv")
    refused(train("training.lora_rank=0"), "training.lora_rank=0: expected 1 or more")
