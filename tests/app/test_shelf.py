"""Concepts to choose from: known by keys, inside the log folder, and never a file that runs something."""

import pickle

import pytest
from helpers import ROOT

from dci.app.shelf import UPLOADS, Shelf, inside
from dci.concept.concept_file import Concept
from ldm.checkpoint import fingerprint
from ldm.errors import UserError

DEMOS = sorted((ROOT / "data/demo").glob("*.safetensors"))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("file", DEMOS, ids=lambda file: file.stem)
def test_a_demo_concept_is_small_belongs_to_the_embedded_model_and_names_no_machine(file, tiny_base):
    concept = Concept.load(file)
    assert file.stat().st_size <= 1e6
    assert concept.base == fingerprint(tiny_base)
    assert "'/" not in str(concept.config)
    assert (ROOT / concept.config["data"]["images"]).is_dir()


def test_there_are_three_demo_concepts_and_the_page_lists_them(shelf):
    assert len(DEMOS) >= 3
    assert {f"demo:{file.stem}" for file in DEMOS} < {entry.key for entry in shelf.entries()}


def test_finished_runs_are_listed_and_unfinished_ones_are_not(shelf, concept_file):
    (concept_file.parent.parent / "2026-02-02T00-00-00_cat/configs").mkdir(parents=True, exist_ok=True)
    runs = [entry for entry in shelf.entries() if entry.key.startswith("run:")]
    assert [entry.file for entry in runs] == [concept_file]
    assert shelf.find("run:2026-01-01T00-00-00_cat").file == concept_file
    assert [name.class_noun for name in shelf.names(runs[0].key)] == ["cat"]


@pytest.mark.parametrize("key", ["", None, "run:../..", "/etc/passwd", "run:/etc", "demo:../../x", "file:0", "upload:1"])
def test_a_key_that_is_none_of_the_lists_leads_nowhere(shelf, key):
    with pytest.raises(UserError, match="choose"):
        shelf.find(key)


def test_a_run_that_is_a_link_out_of_the_log_folder_is_not_listed(studio, concept_file, tmp_path):
    logs = tmp_path / "logs"
    (logs / "run").mkdir(parents=True)
    (logs / "run/concept.safetensors").symlink_to(concept_file)
    (logs / "folder").symlink_to(concept_file.parent)
    shelf = Shelf(studio.read, [], logs)
    assert not [entry for entry in shelf.entries() if entry.key.startswith("run:")]


def test_inside_follows_links(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/out").symlink_to("/etc")
    assert inside(tmp_path / "a/b", tmp_path / "a")
    assert not inside(tmp_path / "a/out/hosts", tmp_path / "a")
    assert not inside(tmp_path / "a/../x", tmp_path / "a")


@pytest.mark.parametrize("name", ["evil.safetensors", "evil.pt", "evil.bin", "evil.ckpt"])
def test_a_hostile_upload_runs_nothing_is_refused_and_deleted(shelf, tmp_path, name):
    file, trace = tmp_path / name, tmp_path / "trace"
    file.write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
    with pytest.raises(UserError) as refusal:
        shelf.add(file, file.name)
    assert "\n" not in str(refusal.value) and str(tmp_path) not in str(refusal.value)
    assert not trace.exists() and not file.exists()


def test_uploads_are_kept_up_to_a_number(shelf, concept_file, tmp_path):
    files = []
    for i in range(UPLOADS + 2):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(concept_file.read_bytes())
        files.append((file, shelf.add(file, file.name)))
    assert [file.exists() for file, _ in files] == [False, False] + [True] * UPLOADS
    with pytest.raises(UserError):
        shelf.find(files[0][1].key)
    assert shelf.choices(files[-1][1].key)[0] == (files[-1][0].name, files[-1][1].key)


def test_a_file_that_changed_is_read_anew(shelf, concept_file, tmp_path):
    file = tmp_path / "concept.safetensors"
    file.write_bytes(concept_file.read_bytes())
    entry = shelf.add(file, file.name)
    assert shelf.load(entry) is shelf.load(entry)
    file.write_bytes(b"broken")
    with pytest.raises(UserError):
        shelf.load(entry)
