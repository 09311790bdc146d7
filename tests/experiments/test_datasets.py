"""DreamBench and CustomConcept101, read from folders of the published layout."""

import json

import pytest
from helpers import SHARED

from dci.experiments.datasets import read_customconcept101, read_dreambench, read_dreambench_plus
from ldm.errors import UserError

DREAMBENCH = """Classes

subject_name,class
dog6,dog
berry_bowl,bowl
grey_sloth_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} on a cook\\'s table'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dreambench(tmp_path):
    root = tmp_path / "dreambooth" / "dataset"
    for name in ("dog6", "grey_sloth_plushie", "another"):
        (root / name).mkdir(parents=True)
    (root / "prompts_and_classes.txt").write_text(DREAMBENCH)
    return root


def test_dreambench(dreambench):
    for folder in (dreambench, dreambench.parent):
        dog, sloth = read_dreambench(folder)
        assert (dog.name, dog.class_nouns, dog.prompts) == ("dog6", ("dog",), ("a {} wearing a red hat",))
        assert (sloth.class_nouns, sloth.images) == (("stuffed animal",), (dreambench / "grey_sloth_plushie",))
        assert sloth.prompts == ("a {} in the jungle", "a {} on a cook's table")


@pytest.mark.parametrize("text", ["", DREAMBENCH.replace("{0} {1}", "one"), DREAMBENCH.split("Live")[0]])
def test_dreambench_of_another_layout(dreambench, text):
    (dreambench / "prompts_and_classes.txt").write_text(text)
    with pytest.raises(UserError, match="as published"):
        read_dreambench(dreambench)


def test_dreambench_without_its_parts(dreambench, tmp_path):
    for name in ("dog6", "grey_sloth_plushie"):
        (dreambench / name).rmdir()
    with pytest.raises(UserError, match="none of the 3 subjects"):
        read_dreambench(dreambench)
    with pytest.raises(UserError, match="prompts_and_classes.txt"):
        read_dreambench(tmp_path / "nowhere")


@pytest.mark.skipif(not (SHARED / "dreambench").is_dir(), reason="the photographs are not here")
def test_dreambench_as_published():
    subjects = read_dreambench(SHARED / "dreambench")
    assert len(subjects) == 8
    assert all(len(subject.prompts) == 25 for subject in subjects)
    live = {subject.name for subject in subjects if "a {} wearing a red hat" in subject.prompts}
    assert live == {"cat2", "dog"}


@pytest.fixture
def dreambench_plus(tmp_path):
    """Three images with their captions, in the folders in which they are published."""
    root = tmp_path / "dreambench_plus/data"
    subjects = {"live_subject/animal/00": "Kitten", "object/07": "Alarm clock", "style/02": "ink wash painting"}
    for place, subject in subjects.items():
        for folder, ending, content in (("images", ".jpg", None), ("captions", ".txt", subject)):
            file = (root / folder / place).with_suffix(ending)
            file.parent.mkdir(parents=True, exist_ok=True)
            word = subject.lower()
            prompts = [f"A {word} in the snow.", f"a {word.split()[-1]} at night", "a boat on a lake."] + ["a thing"] * 6
            file.write_text("\n".join([subject, *prompts]) + "\n") if content else file.write_bytes(b"an image")
    return root


def test_dreambench_plus(dreambench_plus):
    for folder in (dreambench_plus, dreambench_plus.parent):
        kitten, clock, ink = read_dreambench_plus(folder)
        assert (kitten.name, kitten.class_nouns) == ("live_subject_animal_00_kitten", ("kitten",))
        assert kitten.images == (dreambench_plus / "images/live_subject/animal/00.jpg",)
        assert kitten.prompts[:3] == ("A {} in the snow.", "a {} at night", "a boat on a lake, {}")
        assert (clock.name, len(clock.prompts)) == ("object_07_alarm_clock", 9)
        assert clock.prompts[1] == "a {} at night"
        assert ink.name == "style_02_ink_wash_painting"


def test_dreambench_plus_without_its_parts(dreambench_plus, tmp_path):
    with pytest.raises(UserError, match="data.zip"):
        read_dreambench_plus(tmp_path / "nowhere")
    (dreambench_plus / "captions/object/07.txt").write_text("Alarm clock\n")
    with pytest.raises(UserError, match="no prompts"):
        read_dreambench_plus(dreambench_plus)
    (dreambench_plus / "images/live_subject/animal/00.jpg").unlink()
    with pytest.raises(UserError, match="00.jpg"):
        read_dreambench_plus(dreambench_plus)


def entry(token, noun, folder, prompts):
    return {
        "instance_prompt": f"photo of a {token} {noun}",
        "class_prompt": noun.split()[0],
        "instance_data_dir": f"./benchmark_dataset/{folder}",
        "class_data_dir": f"./regularization/{folder}",
        "prompt_filename": f"prompts/{prompts}",
    }


@pytest.fixture
def concepts(tmp_path):
    for folder in ("benchmark_dataset/pet_dog1", "benchmark_dataset/plushie_dice", "regularization/pet_dog1", "prompts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts/dog.txt").write_text("photo of a {}\na {} in the snow")  # most files end without a newline
    (tmp_path / "prompts/pet_plushie.txt").write_text("a {0} beside a {1}\n\n")
    dog, dice = entry("<new1>", "dog", "pet_dog1", "dog.txt"), entry("<new2>", "dice plushie", "plushie_dice", "dog.txt")
    (tmp_path / "dataset.json").write_text(json.dumps([dog, dice | {"instance_prompt": "photo of <new1> dice plushie"}]))
    composed = {"prompt_filename_compose": "prompts/pet_plushie.txt"}
    (tmp_path / "dataset_multiconcept.json").write_text(json.dumps([[dog, dice, composed]] * 2))
    return tmp_path


def test_customconcept101(concepts):
    dog, dice = read_customconcept101(concepts)
    assert dog.prompts == ("photo of a {}", "a {} in the snow")
    assert dog.regularization == (concepts / "regularization/pet_dog1",)
    assert (dice.name, dice.class_nouns, dice.regularization) == ("plushie_dice", ("dice plushie",), (None,))


def test_customconcept101_pairs(concepts):
    first, second = read_customconcept101(concepts, pairs=True)
    assert first.class_nouns == ("dog", "dice plushie")
    assert first.prompts == ("a {0} beside a {1}",)
    assert (first.name, second.name) == ("pet_dog1+plushie_dice", "pet_dog1+plushie_dice-2")
    assert [folder.name for folder in first.images] == ["pet_dog1", "plushie_dice"]


def test_customconcept101_without_its_parts(concepts):
    (concepts / "benchmark_dataset/pet_dog1").rmdir()
    with pytest.raises(UserError, match=r"benchmark_dataset\.zip"):
        read_customconcept101(concepts)
    (concepts / "dataset.json").write_text('[{"instance_prompt": "photo of a dog"}]')
    with pytest.raises(UserError, match="layout"):
        read_customconcept101(concepts)
    (concepts / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="layout"):
        read_customconcept101(concepts)
