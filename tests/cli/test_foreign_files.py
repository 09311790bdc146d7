"""The programs for other programs' files: exit code 2 and one line for what cannot be used."""

import pytest
import torch
from helpers import refused, run_here

TINY = ("--model", "configs/model/tiny.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [({"x": torch.ones(2, 2), "y": torch.ones(2, 2)}, "nor of another kind that is known here"),
     ({"<new1>": torch.ones(7)}, "its tokens are 7 wide, those of the model 'tiny' 128")],
)  # fmt: skip
@pytest.mark.parametrize("program", ["import_concept.py", "sample_dci.py"])
def test_files_that_cannot_be_used(capfd, tmp_path, program, content, words, monkeypatch):
    torch.save(content, tmp_path / "x.pt")
    files = [tmp_path / "x.pt", "--out", tmp_path / "c.safetensors"] if program.startswith("import") else \
        ["--concept", tmp_path / "x.pt", "--prompt", "a V* cat"]  # fmt: skip
    refused(run_here(capfd, program, *files, "--class-noun", "cat", *TINY), words)


def test_options_that_do_not_go_together(capfd, tmp_path):
    refused(run_here(capfd, "sample_dci.py", "--concept", tmp_path / "none.safetensors", "--prompt", "a V* cat", *TINY),
            "none.safetensors")  # fmt: skip
    refused(run_here(capfd, "export_concept.py", tmp_path / "none.safetensors", "--to", "lora"), "none.safetensors")
    refused(run_here(capfd, "export_concept.py", tmp_path / "c.safetensors", "--to", "png"), "png")
