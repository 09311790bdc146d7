"""Configurations: every file of the project, unknown keys, types, paths."""

import pytest
from conftest import ROOT

from dci.cluster import SweepConfig
from dci.config import FinetuneConfig
from dci.settings import finetune_config
from dci.suites import SuiteConfig
from ldm import config
from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.pretraining.config import PretrainConfig


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_fits_its_schema(file):
    schemas = {"model": ModelConfig, "train": FinetuneConfig, "pretrain": PretrainConfig}
    schemas |= {"sweep": SweepConfig, "eval": SuiteConfig}
    schema = schemas[file.parent.name]
    needed = ["data.images=x", "concept.class_noun=x"] if schema is FinetuneConfig else []
    config.load(schema, file, needed)


def test_a_saved_configuration_reads_back(tmp_path):
    original = config.build(FinetuneConfig, {"name": "ünïcode: x"}, ["concept.class_noun=dog", "data.images=a b"])
    config.save(original, tmp_path / "c.yaml")
    assert config.load(FinetuneConfig, tmp_path / "c.yaml") == original


def test_later_overrides_win():
    needed = ["concept.class_noun=dog", "data.images=x"]
    built = config.build(FinetuneConfig, {"training": {"steps": 5}}, [*needed, "training.steps=6", "training.steps=7"])
    assert built.training.steps == 7
    assert built.training.batch_size == FinetuneConfig().training.batch_size


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("trainng.steps", "training"), ("training.step", "training.steps"), ("class_noun", "concept.class_noun"),
     ("training.learningrate", "training.learning_rate"), ("contxt.prefix", "context")],
)  # fmt: skip
def test_unknown_keys_name_the_nearest_known_one(key, nearest):
    with pytest.raises(UserError) as error:
        config.build(FinetuneConfig, {}, [f"{key}=1"])
    assert f"unknown key '{key.split('.')[0]}" in str(error.value)
    assert str(error.value).endswith(f"did you mean '{nearest}'?")


def test_unknown_keys_in_a_list_of_sections_are_named_too():
    with pytest.raises(UserError, match=r"unknown key 'concepts\[1\].image'; did you mean 'concepts\[1\].images'\?"):
        config.build(FinetuneConfig, {}, ["concepts=[{class_noun: cat, images: a}, {class_noun: car, image: b}]"])


def test_paths_are_relative_to_the_files_project(tmp_path, monkeypatch):
    (tmp_path / "project/configs/train").mkdir(parents=True)
    file = tmp_path / "project/configs/train/a.yaml"
    file.write_text("data: {images: pictures}\nconcept: {class_noun: dog}\nmodel: m.yaml\n")
    monkeypatch.chdir(tmp_path)
    read = finetune_config(file)
    assert read.data.images == str(tmp_path / "project/pictures")
    assert read.model == str(tmp_path / "project/m.yaml")
    assert finetune_config(file, ["data.images=mine"]).data.images == str(tmp_path / "mine")
    assert config.project_root(tmp_path / "alone.yaml") == tmp_path
