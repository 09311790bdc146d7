"""Scores in files: read and written back byte for byte, those of version 0.1 too, or refused in one line."""

import json
import math
import re

import pytest
from helpers import STORED

from dci.evaluation.grid_result import GridResult
from dci.evaluation.scores import Scores
from ldm.errors import UserError


@pytest.mark.parametrize(("name", "kind"), [("scores.json", Scores), ("result.json", GridResult)])
def test_stored_scores_are_read_and_written_back(tmp_path, name, kind):
    kind.load(STORED / name).save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (STORED / name).read_bytes()


def test_a_result_has_its_place_and_its_scores():
    result = GridResult.load(STORED / "result.json")
    assert (result.concept, result.method, result.seed, result.setting) == ("cat", "ico", 0, "dci")
    assert result.sampling["steps"] == 2 and result.scores.rows[1].noise == "0:1"
    assert result.scores.summary["kid"].mean == 0.25 and math.isnan(result.scores.summary["kid"].low)


def test_version_01_said_facts(tmp_path):
    Scores.load(STORED / "scores-0.1.json").save(tmp_path / "scores.json")
    assert (tmp_path / "scores.json").read_bytes() == (STORED / "scores.json").read_bytes()


def changed(tmp_path, name, change):
    content = json.loads((STORED / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def test_a_newer_versions_key_is_left_out(tmp_path):
    file = changed(tmp_path, "result.json", lambda content: content.update(later=1))
    assert GridResult.load(file).scores.rows == GridResult.load(STORED / "result.json").scores.rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("method"), "(method is missing)"),
        (lambda content: content.pop("rows"), "(rows is missing)"),
        (lambda content: content.pop("metadata"), "(metadata: expected an object with folder, images, references"),
        (lambda content: content.update(seed="0"), "(seed: expected a whole number, not '0')"),
        (lambda content: content["rows"][1].pop("prompt"), "(rows[1]: prompt is missing)"),
        (lambda content: content["rows"][0].update(later=1), "(rows[0]: unknown key 'later')"),
        (lambda content: content["rows"][0]["values"].update(clip_t="1"), "values.clip_t: expected a number, not '1')"),
        (lambda content: content["summary"]["clip_t"].pop("n"), "(summary.clip_t: n is missing)"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, change, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        GridResult.load(changed(tmp_path, "result.json", change))
    assert "result.json holds no scores of a grid's point" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Scores, GridResult])
@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_other_files_are_refused(tmp_path, kind, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match="result.json holds no scores"):
        kind.load(tmp_path / "result.json")
    with pytest.raises(UserError, match="none.json holds no scores"):
        kind.load(tmp_path / "none.json")
