"""What a grid tells the processes of its stages: read from JSON and written back, or refused in one line."""

import json
import re

import pytest
from helpers import STORED

from dci.experiments import cell
from dci.experiments.tasks import ScoreTask, TrainTask, from_json, to_json
from ldm.errors import UserError

KINDS = {"train": TrainTask, "score": ScoreTask}


@pytest.mark.parametrize("stage", KINDS)
def test_a_stored_task_is_read_and_written_back(stage):
    text = (STORED / f"{stage}-task.json").read_text().strip()
    assert to_json(from_json(KINDS[stage], text)) == text


def test_a_tasks_parts_have_their_types():
    task = from_json(ScoreTask, (STORED / "score-task.json").read_text())
    assert (task.place.concept, task.place.seed, task.sampling.steps, task.evaluation.resamples) == ("cat", 0, 8, 9999)
    assert task.references == ("data/concepts/cat",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": 3}, "the task: prompts: expected text, not 3"),
        ({"references": "a"}, "the task: references: expected a list, not 'a'"),
        ({"references": [None]}, "the task: references[0]: expected text, not None"),
        ({"place": {"concept": "cat"}}, "the task: place: method is missing"),
        ({"place": None}, "the task: place: expected an object with concept, method, seed, setting"),
        ({"sampling": {"stepz": 3}}, "the task: sampling: unknown key 'stepz'"),
        ({"sampling": {"steps": True}}, "the task: sampling: steps: expected a whole number, not True"),
        ({"sampling": {"loras": [1]}}, "the task: sampling: loras[0]: expected text, not 1"),
    ],
)
def test_what_is_missing_or_wrong_is_named(change, words):
    content = json.loads((STORED / "score-task.json").read_text())
    with pytest.raises(UserError, match=re.escape(words)):
        from_json(ScoreTask, json.dumps(content | change))


def test_a_newer_versions_key_is_no_mistake():
    content = json.loads((STORED / "train-task.json").read_text())
    assert from_json(TrainTask, json.dumps(content | {"later": 1})) == from_json(TrainTask, json.dumps(content))


@pytest.mark.parametrize("stage", KINDS)
@pytest.mark.parametrize("text", ["{", "[]", '{"device": "cpu"}'])
def test_a_process_refuses_it_in_one_line(stage, text, capfd):
    with pytest.raises(SystemExit) as stop:
        cell.main([stage, text])
    assert stop.value.code == 2 and len(capfd.readouterr().err.strip().splitlines()) == 1
