"""Configurations: every file of the project, unknown keys, types, paths."""

import json
import os

import pytest
from helpers import ROOT, mostly_slow

from dci.experiments.suite import SuiteConfig
from dci.finetuning.config import ConceptConfig, FinetuneConfig, concepts_of
from dci.finetuning.config_files import check, finetune_config
from ldm import config
from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.pretraining.config import PretrainConfig

TRAININGS = sorted((ROOT / "configs/train").glob("*.yaml"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_fits_its_schema(file):
    schemas = {"model": ModelConfig, "train": FinetuneConfig, "pretrain": PretrainConfig}
    schemas |= {"sweep": SuiteConfig, "eval": SuiteConfig}
    schema = schemas[file.parent.name]
    needed = ["data.images=x", "concept.class_noun=x"] if schema is FinetuneConfig else []
    config.load(schema, file, needed)


@pytest.mark.parametrize("file", mostly_slow(TRAININGS, ROOT / "configs/train/ico-tiny.yaml"), ids=lambda f: f.stem)
def test_every_training_configuration_takes_one_concept_or_a_list(file):
    """In the short form where the file leaves it open, or in a list, which says the same."""
    short, one = ["concept.class_noun=dog", "data.images=x"], 'concepts=[{"class_noun": "dog", "images": "x"}]'
    two = 'concepts=[{"class_noun": "dog", "images": "x"}, {"class_noun": "red car", "images": "y"}]'
    for overrides, nouns in ([one], ["dog"]), ([two], ["dog", "red car"]), (short, ["dog"]):
        if overrides is short and "concepts:" in file.read_text():
            with pytest.raises(UserError, match="short form"):
                finetune_config(file, short)
            continue
        found = finetune_config(file, overrides)
        check(found)
        assert [entry.class_noun for entry in concepts_of(found)] == nouns
    if "concepts:" not in file.read_text():
        assert concepts_of(finetune_config(file, short)) == concepts_of(finetune_config(file, [one]))


def test_a_saved_configuration_reads_back(tmp_path):
    original = config.build(FinetuneConfig, {"name": "ünïcode: x"}, ["concept.class_noun=dog", "data.images=a b"])
    config.save(original, tmp_path / "c.yaml")
    assert config.load(FinetuneConfig, tmp_path / "c.yaml") == original


ODD = [
    *(
        "my dogs #2",
        "#dogs",
        "~",
        "~/dogs",
        "${HOME}",
        "a\\${b}${c",
        "dogs: best",
        "dogs:",
        "it's",
        '"my" dogs',
        "'dogs",
        " dogs ",
    ),
    *(
        "a=b",
        "a, b",
        "[dogs]",
        "{dogs}",
        "- dogs",
        "*dogs",
        "&dogs",
        "!dogs",
        "%dogs",
        "@dogs",
        "`dogs`",
        "dogs|",
        ">dogs",
        "?dogs",
    ),
    *(
        "007",
        "1e5",
        "1_000",
        "yes",
        "true",
        "None",
        "2024-01-01",
        "0x1F",
        "1:30",
        "+.5",
        ".nan",
        "tab\there",
        "new\nline",
        "$dogs",
    ),
    *("a;b", "a&b", "???x", "C:\\dogs", "\\dogs\\", "ünïcødé 猫 😀", os.fsdecode(b"latin \xff\xe9")),
]
"""Names of folders and files, each of which is data."""


@pytest.mark.parametrize("name", mostly_slow(ODD, *list(ODD)[::6]))
def test_paths_and_names_in_overrides_are_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("concept: {class_noun: dog}\n")
    path, given = str(tmp_path / name), ["data.images", "data.regularization", "generate.folder", "model", "checkpoint"]
    run = name.replace("/", "")  # which a run folder's name cannot have
    options = [*(f"{key}={path}" for key in given), f"data.images={name}", f"name={run}", f"logging.wandb={name}"]
    built = finetune_config("c.yaml", options)
    found = [built.data.images, built.data.regularization, built.generate.folder, built.model, built.checkpoint]
    assert found == [path] * len(given)
    assert (built.name, built.logging.wandb) == (run, name)


def test_what_is_written_is_read_back(tmp_path):
    concepts = [{"class_noun": name, "images": name, "regularization": name} for name in ODD]
    original = config.build(FinetuneConfig, {"concepts": concepts, "concept": {"class_noun": "x"}, "data": {"images": "x"}})
    config.save(original, tmp_path / "c.yaml")
    assert config.load(FinetuneConfig, tmp_path / "c.yaml") == original
    as_json = config.build(FinetuneConfig, {}, [f"concepts={json.dumps(concepts)}", "concept.class_noun=x", "data.images=x"])
    assert as_json.concepts == original.concepts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("null", None),
        ("", None),
        ("generate", "generate"),
        ('"a b"', "a b"),
        ("'a: b'", "a: b"),
        ('"a" and "b"', '"a" and "b"'),
    ],
)
def test_texts_that_are_no_paths_keep_their_meaning(value, expected):
    needed = ["concept.class_noun=dog", "data.images=x"]
    assert config.build(FinetuneConfig, {}, [*needed, f"data.regularization={value}"]).data.regularization == expected


def test_quotes_are_kept_where_a_file_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "'dogs'").mkdir()
    needed = ["concept.class_noun=dog", "data.images='dogs'"]
    assert config.build(FinetuneConfig, {}, needed).data.images == "'dogs'"


ALSO_YAML = {"~", "[dogs]", "{dogs}", "007", "1e5", "1_000", "0x1F", "yes", "true", "+.5", ".nan"}


def test_options_of_any_kind_take_paths_too():
    names = sorted({*ODD} - ALSO_YAML)
    options = [f"sampling.option_{i}={name}" for i, name in enumerate(names)]
    built = config.build(SuiteConfig, {"name": "x", "methods": []}, [*options, "sampling.steps=7", "sampling.eta=0.5"])
    assert list(built.sampling.values()) == [*names, 7, 0.5]


def test_a_concept_without_a_class_noun_is_one_line():
    with pytest.raises(UserError, match=r"^concepts\[1\]\.class_noun must be given"):
        concepts_of(FinetuneConfig(concepts=[ConceptConfig("dog"), ConceptConfig()]))
    with pytest.raises(UserError, match=r"^concept\.class_noun must be given"):
        concepts_of(FinetuneConfig())


def test_later_overrides_win():
    needed = ["concept.class_noun=dog", "data.images=x"]
    built = config.build(FinetuneConfig, {"training": {"steps": 5}}, [*needed, "training.steps=6", "training.steps=7"])
    assert built.training.steps == 7
    assert built.training.batch_size == FinetuneConfig().training.batch_size


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainng.steps", "training"),
        ("training.step", "training.steps"),
        ("class_noun", "concept.class_noun"),
        ("training.learningrate", "training.learning_rate"),
        ("contxt.prefix", "context"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(key, nearest):
    with pytest.raises(UserError) as error:
        config.build(FinetuneConfig, {}, [f"{key}=1"])
    assert f"unknown key '{key.split('.')[0]}" in str(error.value)
    assert str(error.value).endswith(f"did you mean '{nearest}'?")


def test_unknown_keys_like_no_other_get_a_list():
    with pytest.raises(UserError, match="unknown key 'zzz': expected one of name, [^?]*$"):
        config.build(FinetuneConfig, {}, ["zzz=1"])


def test_unknown_keys_in_a_list_of_sections_are_named_too():
    with pytest.raises(UserError, match=r"unknown key 'concepts\[1\].image'; did you mean 'concepts\[1\].images'\?"):
        config.build(FinetuneConfig, {}, ["concepts=[{class_noun: cat, images: a}, {class_noun: car, image: b}]"])


def test_paths_are_relative_to_the_files_project(tmp_path, monkeypatch):
    (tmp_path / "project/configs/train").mkdir(parents=True)
    file = tmp_path / "project/configs/train/a.yaml"
    file.write_text("data: {images: images}\nconcept: {class_noun: dog}\nmodel: m.yaml\n")
    monkeypatch.chdir(tmp_path)
    read = finetune_config(file)
    assert read.data.images == str(tmp_path / "project/images")
    assert read.model == str(tmp_path / "project/m.yaml")
    assert finetune_config(file, ["data.images=mine"]).data.images == str(tmp_path / "mine")
    assert config.project_root(tmp_path / "alone.yaml") == tmp_path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training=3", "training=3: expected a section with options such as steps"),
        ("training=[1]", "expected a section"),
        ("training=steps", "expected a section"),
        ("training.steps.x=3", "expected a value of type int"),
        ("concepts={class_noun: cat}", "expected a list of sections"),
        ("concepts=cat", "expected a list of sections"),
        ("concepts=[cat]", "expected a list of sections"),
        ("concept.initial_words=[[a]]", r"expected a value of type list\[str\]"),
        ("concept.initial_words={a: b}", r"expected a value of type list\[str\]"),
        ("validation.prompts=[{V*: dog}]", r"expected a value of type list\[str\]"),
        ("loras=[[a, b]]", r"expected a value of type list\[str\]"),
    ],
)
def test_a_value_in_place_of_a_section_or_a_list_is_refused(override, words):
    with pytest.raises(UserError, match=f"the command line: .*{words}"):
        config.build(FinetuneConfig, {}, [override])


def test_validation_without_prompts_is_refused():
    with pytest.raises(UserError, match="validation.prompts is empty"):
        check(config.build(FinetuneConfig, {"concept": {"class_noun": "dog"}}, ["validation.prompts=[]"]))
    check(config.build(FinetuneConfig, {"concept": {"class_noun": "dog"}}, ["validation.prompts=[]", "validation.every=0"]))
