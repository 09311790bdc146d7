"""Grids of cells: their commands, their states, workers that fail or are killed. The programs are stand-ins."""

import csv
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_benchmarks import concepts  # noqa: F401
from test_scripts import refused, run_here, run_main

from dci import grid
from dci.cells import Worker, chosen, last_words, state
from dci.grid import by_training, cells
from dci.suites import load_suite
from ldm.errors import UserError

TRAIN = """
import os, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
logdir = Path(given["--logdir"])
if "training.steps=13" in sys.argv:
    print("\\rtraining: 10%\\rtraining: 20%\\nerror: thirteen steps bring bad luck\\n", file=sys.stderr); sys.exit(2)
hold = Path(os.environ["HOLD"])
if logdir.parts[-3:] == ("cat", "ico", "0") and hold.exists():
    (hold / "worker").write_text(str(os.getppid()))
    (hold / "program").write_text(str(os.getpid()))
    print("holding", flush=True)
    time.sleep(60)
with open(hold.parent / "trained", "a") as file:
    print(*logdir.parts[-3:], os.environ["OMP_NUM_THREADS"], any(n.startswith("SLURM_") for n in os.environ), file=file)
(logdir / "RUN").mkdir()
(logdir / "RUN" / "concept.safetensors").write_text(" ".join(sys.argv[1:]))
"""
SAMPLE = """
import sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
(Path(given["--outdir"]) / "drawn").write_text(Path(given["--concept"]).read_text() + " ".join(sys.argv[1:]))
"""
EVALUATE = """
import json, sys, zlib
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, drawn = Path(given["--out"]), Path(given["--samples"]) / "drawn"
noise, picture = drawn.read_text().split("--seed ")[1].split()[0], str(next(Path(given["--references"]).glob("*.png")))
score = zlib.crc32("/".join(drawn.parts[-5:]).encode()) / 2**32
rows = [dict(file=picture, prompt=p, text=p, noise=noise, values={"clip_t": score, "dino_i": score / 3}) for p in ("a", "b")]
summary = {name: dict(mean=rows[0]["values"][name], low=None, high=1.0, n=2) for name in rows[0]["values"]}
out.mkdir(exist_ok=True)
(out / "scores.json").write_text(json.dumps({"runs": [dict(name="x", rows=rows, summary=summary, facts={})]}))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The file of a grid of 2 x 2 x 2 cells over stand-ins for the programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("train_ico.py", TRAIN), ("sample_dci.py", SAMPLE), ("evaluate.py", EVALUATE)):
        (programs / name).write_text(text)
    monkeypatch.setattr(grid, "PROGRAMS", programs)
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    content = yaml.safe_load((ROOT / "configs/sweep/tiny.yaml").read_text())
    content |= {"outdir": str(tmp_path / "out"), "prompts": str(ROOT / content["prompts"]), "workers": 2}
    for entry in content["concepts"]:
        entry["images"] = str(ROOT / entry["images"])
    for entry in content["methods"]:
        entry["config"] = str(ROOT / entry["config"])
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def sweep(config, *args):
    """Run sweep.py within this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        run_main("sweep.py", "--config", config, *args)
    return stop.value.code


def table(tmp_path):
    with open(tmp_path / "out/tiny/results.csv") as file:
        return list(csv.DictReader(file))


def tiny_grid(config, *overrides):
    return load_suite(config, overrides)


def test_cells_are_the_product_and_share_trainings(config):
    settings = ("settings=[{name: dci, sampling: {agg_time: [0.2, 0.4], agg_lambda: [0, 1]}}, "
                "{name: plain, sampling: {no_dci: true}}]")  # fmt: skip
    all_cells = cells(tiny_grid(config, settings))
    assert len(all_cells) == 2 * 2 * 2 * 5
    groups = by_training(all_cells)
    assert [len(group) for group in groups] == [5] * 8
    assert all(len({cell.training.command for cell in group}) == 1 for group in groups)
    assert len({cell.folder for cell in all_cells}) == 40 and len({group[0].training.folder for group in groups}) == 8
    assert [cell.setting for cell in groups[0]] == [
        "dci-agg_time=0.2-agg_lambda=0", "dci-agg_time=0.2-agg_lambda=1",
        "dci-agg_time=0.4-agg_lambda=0", "dci-agg_time=0.4-agg_lambda=1", "plain",
    ]  # fmt: skip
    last = next(cell for cell in all_cells if cell.name == "car/custom-diffusion/1/dci-agg_time=0.4-agg_lambda=1")
    sampling, training = " ".join(last.sampling), " ".join(last.training.command)
    assert "--agg-time 0.4" in sampling and "--agg-lambda 1" in sampling and "--seed 1" in sampling
    assert all(part in training for part in ("custom-diffusion-tiny.yaml", "training.seed=1", "concept.class_noun=car"))
    assert groups[0][-1].sampling[-1] == "--no-dci"


@pytest.mark.parametrize("override, words", [
    ("seeds=[]", "seeds is empty"),
    ("seeds=[1,1]", "'1' is there twice"),
    ("settings=[{name: a/b}]", "'a/b' names a folder"),
    ("n_samples=0", "n_samples=0"),
    ("prompts=/nowhere.txt", "no file /nowhere.txt"),
    ("seedz=[1]", "did you mean 'seeds'"),
])  # fmt: skip
def test_a_grid_that_cannot_be_is_refused(config, override, words):
    with pytest.raises(UserError, match=words.replace("[", "\\[")):
        tiny_grid(config, override)


def test_mistakes_get_one_line(config, capfd, monkeypatch):
    refused(run_here(capfd, "sweep.py", "--config", config, "cluster=moon"), "cluster=moon", "slurm")
    refused(run_here(capfd, "sweep.py", "--config", config, "--only", "dog/*"), "dog/*", "cat/ico/0/dci")
    refused(run_here(capfd, "sweep.py", "--config", config, "workers=0"), "workers=0")
    monkeypatch.setenv("PATH", "/nowhere")
    refused(run_here(capfd, "sweep.py", "--config", config, "cluster=slurm"), "Slurm", "cluster=local")


def test_a_failed_cell_is_listed_and_run_again_alone(config, tmp_path, capfd):
    run_main("sweep.py", "--config", config, "--dry-run")
    out = capfd.readouterr().out
    assert "8 cells in 8 jobs; 0 of 8 cells are done" in out and out.count("train_ico.py") == 8
    assert not (tmp_path / "out").exists()

    broken = yaml.safe_load(config.read_text())
    broken["concepts"][1]["training"] = ["training.steps=13"]
    bad = config.with_name("bad.yaml")
    bad.write_text(yaml.safe_dump(broken))
    assert sweep(bad, "seeds=[0]") == 1
    captured = capfd.readouterr()
    assert "failed: car/ico/0/dci: error: thirteen steps bring bad luck" in captured.err
    assert "2 of 4 cells" in captured.out
    assert [row["concept"] for row in table(tmp_path)] == ["cat", "cat"]
    run_main("sweep.py", "--config", bad, "seeds=[0]", "--status")
    out = capfd.readouterr().out
    assert "2 done, 2 failed" in out and "bad luck" in out
    # Mended: the folders that were begun with the other options are refused until they are gone.
    refused(run_here(capfd, "sweep.py", "--config", config, "seeds=[0]"), "other options", "car/ico/0")
    grid_folder = tmp_path / "out/tiny"
    for part in ("cells", "trainings"):
        (grid_folder / part / "car").rename(tmp_path / f"old-{part}")
    assert sweep(config, "seeds=[0]", "--only", "car/ico/0/dci") == 0
    assert "3 of 4 cells" in capfd.readouterr().out


def test_a_killed_worker_takes_its_program_along_and_a_second_call_completes(config, tmp_path, capfd):
    hold = tmp_path / "hold"
    hold.mkdir()

    def kill():
        while not (hold / "program").exists() or not (hold / "program").read_text():
            time.sleep(0.05)
        os.kill(int((hold / "worker").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert sweep(config, "seeds=[0]") == 1
    killer.join()
    captured = capfd.readouterr()
    assert "failed: cat/ico/0/dci: the worker was killed; before: holding" in captured.err and "3 of 4 cells" in captured.out
    assert len(table(tmp_path)) == 3
    assert not Path(f"/proc/{(hold / 'program').read_text()}/cmdline").exists()
    for file in hold.iterdir():
        file.unlink()
    hold.rmdir()
    assert sweep(config, "seeds=[0]") == 0
    rows = table(tmp_path)
    assert [(row["concept"], row["method"]) for row in rows] == [
        (concept, method) for concept in ("cat", "car") for method in ("ico", "custom-diffusion")
    ]
    result = json.loads((tmp_path / "out/tiny/cells/cat/ico/0/dci/result.json").read_text())
    assert float(rows[0]["clip_t"]) == result["summary"]["clip_t"]["mean"] and rows[0]["clip_t_low"] == ""
    assert (tmp_path / "out/tiny/report/report.html").is_file()
    # Every run was trained once, with one thread, and saw no batch system.
    trained = (tmp_path / "trained").read_text().splitlines()
    assert len(trained) == len(set(trained)) == 4 and all(line.endswith(" 1 False") for line in trained)
    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}
    assert sweep(config, "seeds=[0]") == 0
    assert len(results) == 4
    assert results == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}


def test_cells_of_one_training_train_once_and_fail_together(config, tmp_path):
    settings = "settings=[{name: a, sampling: {agg_time: 0.2}}, {name: b, sampling: {agg_time: 0.3}}]"
    group = by_training(cells(tiny_grid(config, settings)))[1]
    assert state(group[0]) == "waiting" and state(group[0], {group[0].training.name}) == "queued"
    assert Worker(threads=1).work(group) == {}
    assert [state(cell) for cell in group] == ["done", "done"]
    assert (tmp_path / "trained").read_text().count("cat ico 1") == 1
    failing = by_training(cells(tiny_grid(config, settings, "name=other", "training=[training.steps=13]")))[0]
    failures = Worker(threads=1).work(failing)
    assert list(failures) == [cell.name for cell in failing]
    assert [state(cell) for cell in failing] == ["failed", "failed"]
    assert all(last_words(cell) == "error: thirteen steps bring bad luck" for cell in failing)
    assert (failing[0].training.folder / "log.txt").read_text().count("$ ") == 1


def test_the_queue_is_not_seen_from_a_machine_without_slurm(config, tmp_path, capfd, monkeypatch):
    (tmp_path / "out/tiny").mkdir(parents=True)
    (tmp_path / "out/tiny/jobs.json").write_text('{"cat/ico/0": "7_0"}')
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="no squeue on this machine"):
        run_main("sweep.py", "--config", config, "--status")
    assert "8 waiting" in capfd.readouterr().out


def test_a_suite_of_a_data_set_is_a_sweep(config, concepts, tmp_path, capfd):  # noqa: F811
    suite = ("--config", ROOT / "configs/eval/customconcept101.yaml", f"dataset.folder={concepts}",
             f"outdir={tmp_path / 'out'}", "training=[model=WEIGHTS,validation.every=0]")  # fmt: skip
    run_main("sweep.py", *suite, "--dry-run")
    out = capfd.readouterr().out
    assert "8 cells in 4 jobs; 0 of 8 cells are done" in out
    assert out.count("train_ico.py") == out.count("model=WEIGHTS") == 4 and out.count("--no-dci") == 4
    assert out.count("'concept.class_noun=dice plushie'") == 2
    assert (tmp_path / "out/customconcept101/prompts/pet_dog1.txt").read_text() == "photo of a {}\na {} in the snow\n"
    refused(run_here(capfd, "sweep.py", *suite[:2]), "dataset.folder=FOLDER")


@pytest.mark.parametrize("file", sorted((ROOT / "scripts/slurm").glob("*.sbatch")), ids=lambda file: file.stem)
def test_batch_files_say_what_each_resource_is_and_name_no_site(file):
    lines = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    given = dict(re.fullmatch(r"#SBATCH --([a-z-]+)\S*(.*)", line).groups() for line in lines)
    assert {"ntasks", "ntasks-per-node"} & given.keys() and {"gpus-per-node", "cpus-per-task", "mem", "time"} <= given.keys()
    assert [name for name, rest in given.items() if not rest.strip().startswith("# ")] == ["job-name", "output"]
    assert not given.keys() & {"partition", "account", "qos", "constraint", "nodelist", "exclude", "mail-user"}
    assert ("signal" in given) == (file.stem != "evaluate")


def test_patterns_choose_cells(config):
    all_cells = cells(tiny_grid(config))
    assert [cell.name for cell in chosen(all_cells, "c*/ico/1/dci")] == ["cat/ico/1/dci", "car/ico/1/dci"]
    assert chosen(all_cells, None) == all_cells
