"""Grids: their points, the points' states, workers that fail or are killed. The stages are stand-ins."""

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
from helpers import LINUX, ROOT, refused, run_here, run_main
from test_datasets import concepts  # noqa: F401

from dci.experiments import grid
from dci.experiments.comparison import varied
from dci.experiments.grid import by_training, grid_points
from dci.experiments.launchers import _next, run_local
from dci.experiments.runner import PointBusy, Worker, chosen, last_words, state
from dci.experiments.suite import load_suite
from dci.files import folder_lock
from ldm.errors import Note, UserError

CELL = """
import json, os, sys, time, zlib
from pathlib import Path

def train(task):
    logdir, place = Path(task["logdir"]), Path(task["logdir"]).parts[-3:]
    if "training.steps=13" in task["options"]:
        print("\\rtraining: 10%\\rtraining: 20%\\nerror: thirteen steps bring bad luck\\n", file=sys.stderr); sys.exit(2)
    hold = Path(os.environ["HOLD"])
    if place == ("cat", "ico", "0") and hold.exists():
        (hold / "worker").write_text(str(os.getppid()))
        (hold / "program").write_text(str(os.getpid()))
        print("holding", flush=True)
        time.sleep(60)
    seen = os.environ["OMP_NUM_THREADS"], any(n.startswith("SLURM_") for n in os.environ), os.environ["CUDA_VISIBLE_DEVICES"]
    with open(hold.parent / "trained", "a") as file:
        print(*place, *seen, file=file)
    (logdir / "concept.safetensors").write_text(sys.argv[2])

def score(task):
    score = zlib.crc32(json.dumps(task["place"]).encode()) / 2**32
    image, noise = str(next(Path(task["references"][0]).glob("*.png"))), str(task["sampling"]["seed"])
    rows = [dict(file=image, prompt=p, text=p, noise=noise, values={"clip_t": score, "dino_i": score / 3}) for p in "ab"]
    summary = {name: dict(mean=rows[0]["values"][name], low=None, high=1.0, n=2) for name in rows[0]["values"]}
    folder = Path(task["folder"])
    (folder / "samples").mkdir()
    (folder / "samples/00000.png").write_bytes(Path(image).read_bytes())
    (folder / "prompts.json").write_text(json.dumps({"00000": "a"}))
    (folder / "result.json").write_text(json.dumps(task["place"] | dict(rows=rows, summary=summary, facts={})))

{"train": train, "score": score}[sys.argv[1]](json.loads(sys.argv[2]))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The file of a grid of 2 x 2 x 2 points over stand-ins for the stages."""
    (tmp_path / "cell.py").write_text(CELL)
    monkeypatch.setattr(grid, "CELL", (grid.CELL[0], str(tmp_path / "cell.py")))
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
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
    try:
        run_main("sweep.py", "--config", config, *args)
    except SystemExit as stop:
        return stop.code
    return 0


def table(tmp_path):
    with open(tmp_path / "out/tiny/results.csv") as file:
        return list(csv.DictReader(file))


def tiny_grid(config, *overrides):
    return load_suite(config, overrides)


def test_points_are_the_product_and_share_trainings(config):
    settings = (
        "settings=[{name: dci, sampling: {agg_time: [0.2, 0.4], agg_lambda: [0, 1]}}, "
        "{name: plain, sampling: {no-dci: true}}]"
    )
    points = grid_points(tiny_grid(config, settings))
    assert len(points) == 2 * 2 * 2 * 5
    groups = by_training(points)
    assert [len(group) for group in groups] == [5] * 8
    assert all(len({point.training.command for point in group}) == 1 for group in groups)
    assert len({point.folder for point in points}) == 40 and len({group[0].training.folder for group in groups}) == 8
    assert [point.setting for point in groups[0]] == [
        "dci-agg_time=0.2-agg_lambda=0",
        "dci-agg_time=0.2-agg_lambda=1",
        "dci-agg_time=0.4-agg_lambda=0",
        "dci-agg_time=0.4-agg_lambda=1",
        "plain",
    ]
    last = next(point for point in points if point.name == "car/custom-diffusion/1/dci-agg_time=0.4-agg_lambda=1")
    stage, task = last.command[-2:]
    sampling = json.loads(task)["sampling"]
    assert stage == "score" and (sampling["agg_time"], sampling["agg_lambda"], sampling["seed"]) == (0.4, 1, 1)
    assert last.sampling == {"agg_time": 0.4, "agg_lambda": 1}
    stage, task = last.training.command[-2:]
    assert stage == "train" and "custom-diffusion-tiny.yaml" in task
    assert "training.seed=1" in json.loads(task)["options"] and '"class_noun": "car"' in json.loads(task)["options"][0]
    assert groups[0][-1].task.sampling.no_dci is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seeds=[]", "seeds is empty"),
        ("seeds=[1,1]", "'1' is there twice"),
        ("settings=[{name: a/b}]", "'a/b' names a folder"),
        ("n_samples=0", "n_samples=0"),
        ("prompts=/nowhere.txt", "no file /nowhere.txt"),
        ("seedz=[1]", "did you mean 'seeds'"),
        # What would only show after hours of training:
        ("training=[training.stepz=3]", "did you mean 'training.steps'"),
        ("training=[training.steps=0]", "training.steps=0: expected 1 or more"),
        ("sampling={stepz: 3}", "did you mean 'steps'"),
        ("settings=[{name: dci, sampling: {agg_time: [0.1, early]}}]", "agg_time=early"),
        ("evaluation={clipp: tiny}", "did you mean 'clip'"),
        ("evaluation={clip: nope}", "evaluation: no encoder 'nope'"),
        ("evaluation={clip: dinov2:vits14}", "reads no texts"),
        ("evaluation={instance: transformers:/no/such}", "no folder /no/such"),
        ("evaluation={kid: inception:/no/such.pth}", "no weights /no/such.pth"),
        ("evaluation={regularization: /no/such}", "evaluation.regularization=/no/such: no such folder"),
        ("evaluation={resamples: 0}", "evaluation.resamples=0: expected 1 or more"),
        ("settings=[{name: dci, sampling: {auxiliary_noun: auto, clip: nope}}]", "no encoder 'nope'"),
        ("name=", "name: '' names a folder"),
        ("name=a/b", "name: 'a/b' names a folder"),
        ("slurm.foo=1", "slurm.foo: expected one of account, "),
        ("concepts=[{class_noun: cat}]", "give class_noun and images"),
        ("concepts=[{name: a, concepts: [{class_noun: cat}]}]", "concepts: a: entry 1 of its list needs both"),
        ("concepts=[{concepts: [{images: data/concepts/cat}]}]", "entry 1 of its list needs both class_noun and images"),
        ("concepts=[{name: a, class_noun: cat, images: b, concepts: [{class_noun: dog, images: c}]}]", "not both"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(config, override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        grid_points(tiny_grid(config, override))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("cluster=moon",), ("cluster=moon", "slurm")),
        (("--only", "dog/*"), ("dog/*", "cat/ico/0/dci")),
        (("workers=0",), ("workers=0",)),
        (("--dry-run", "--status"), ("--status", "--dry-run")),
        (("--dry-run", "--tflops", "-1"), ("-1: expected a number above 0",)),
        (("cluster=slurm",), ("Slurm", "cluster=local")),
    ],
)
def test_a_mistake_gets_one_line(config, capfd, monkeypatch, args, words):
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm, even where there is one
    refused(run_here(capfd, "sweep.py", "--config", config, *args), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["outdir=FILE"], "FILE is not a folder"),
        (["--ratings", "nope.csv"], "nope.csv"),
        (["--answers", "nope.csv"], "nope.csv"),
        (["--report", "FILE"], "FILE is not a folder"),
        (["device=nowhere"], "device nowhere cannot be used here"),
        (["device=cuda:99"], "device cuda:99 cannot be used here"),
        (["device=cuda:99", "--dry-run"], "device cuda:99 cannot be used here"),
    ],
)
def test_what_each_cell_would_fail_by_is_found_before_the_first(config, tmp_path, capfd, given, words):
    (tmp_path / "file").touch()
    given, words = [[word.replace("FILE", str(tmp_path / "file")) for word in part] for part in (given, [words])]
    result = run_here(capfd, "sweep.py", "--config", config, *given)
    refused(result, *words)
    assert not result.stdout and not (tmp_path / "trained").exists()


def test_options_without_effect_get_a_note(config):
    with pytest.warns(Note) as notes:
        run_main("sweep.py", "--config", config, "--status", "--tflops", "3", "--no-wait")
    assert [str(note.message) for note in notes] == [
        "--tflops has no effect without --dry-run",
        "--no-wait has no effect without cluster=slurm",
    ]


@pytest.mark.slow
def test_a_failed_point_is_listed_and_run_again_alone(config, tmp_path, capfd):
    run_main("sweep.py", "--config", config, "--dry-run")
    out = capfd.readouterr().out
    assert "8 cells in 8 jobs; 0 of 8 cells are done" in out and out.count("train /") == 8
    assert "8 trainings and 32 images" in out
    assert not (tmp_path / "out").exists()

    broken = yaml.safe_load(config.read_text())
    broken["concepts"][1]["training"] = ["training.steps=13"]
    bad = config.with_name("bad.yaml")
    bad.write_text(yaml.safe_dump(broken))
    assert sweep(bad, "seeds=[0]") == 1
    captured = capfd.readouterr()
    assert "failed: car/ico/0/dci: error: thirteen steps bring bad luck" in captured.err
    # One failure does not cost the report of the others.
    assert "2 of 4 cells" in captured.out and (tmp_path / "out/tiny/report/report.html").is_file()
    assert [row["concept"] for row in table(tmp_path)] == ["cat", "cat"]
    run_main("sweep.py", "--config", bad, "seeds=[0]", "--status")
    out = capfd.readouterr().out
    assert "2 done, 2 failed" in out and "bad luck" in out
    # Mended: the folders that were begun with the other options are refused until they are gone.
    words = ("other options", "car/ico/0", "'training.training.steps' is 13 there and 8 here")
    refused(run_here(capfd, "sweep.py", "--config", config, "seeds=[0]"), *words)
    grid_folder = tmp_path / "out/tiny"
    for part in ("cells", "trainings"):
        (grid_folder / part / "car").rename(tmp_path / f"old-{part}")
    assert sweep(config, "seeds=[0]", "--only", "car/ico/0/dci") == 0
    assert "3 of 4 cells" in capfd.readouterr().out


def assert_ended(process, seconds=20):
    """It runs no more; in a container whose first process collects nobody, a zombie without a command line may stay."""
    command, end = Path(f"/proc/{process}/cmdline"), time.monotonic() + seconds
    while command.exists() and command.read_bytes():
        assert time.monotonic() < end, command.read_bytes()
        time.sleep(0.1)


@pytest.mark.slow
@LINUX
def test_a_killed_worker_takes_its_process_along_and_a_second_call_completes(config, tmp_path, capfd):
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
    assert_ended((hold / "program").read_text())
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
    assert len(trained) == len(set(trained)) == 4 and all(line.endswith(" 1 False ") for line in trained)
    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}
    assert sweep(config, "seeds=[0]") == 0
    assert len(results) == 4
    assert results == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}


@pytest.mark.slow
def test_workers_have_a_gpu_each(config, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sweep(config, "seeds=[0]", "device=cuda", "workers=null") == 0
    trained = (tmp_path / "trained").read_text().splitlines()
    assert {line.split()[-1] for line in trained} == {"3", "5"} and len(trained) == 4


def test_points_of_one_training_train_once_and_fail_together(config, tmp_path):
    settings = "settings=[{name: a, sampling: {agg_time: 0.2}}, {name: b, sampling: {agg_time: 0.3}}]"
    group = by_training(grid_points(tiny_grid(config, settings)))[1]
    assert state(group[0]) == "waiting" and state(group[0], {group[0].training.name}) == "queued"
    assert Worker(threads=1).work(group) == {}
    assert [state(point) for point in group] == ["done", "done"]
    assert (tmp_path / "trained").read_text().count("cat ico 1") == 1
    failing = by_training(grid_points(tiny_grid(config, settings, "name=other", "training=[training.steps=13]")))[0]
    failures = Worker(threads=1).work(failing)
    assert list(failures) == [point.name for point in failing]
    assert [state(point) for point in failing] == ["failed", "failed"]
    assert all(last_words(point) == "error: thirteen steps bring bad luck" for point in failing)
    assert (failing[0].training.folder / "log.txt").read_text().count("$ ") == 1


def test_a_worker_leaves_or_waits_for_points_that_another_one_has(config, tmp_path):
    group, *_ = by_training(grid_points(tiny_grid(config)))
    group[0].folder.mkdir(parents=True)
    lock = folder_lock(group[0].folder)
    with lock:
        with pytest.raises(PointBusy):
            Worker(threads=1).work(group, wait=False)
        worker = threading.Thread(target=Worker(threads=1).work, args=(group,), daemon=True)
        worker.start()
        worker.join(0.5)
        assert worker.is_alive() and not group[0].result.is_file()
    worker.join(60)
    assert group[0].result.is_file() and (tmp_path / "trained").read_text().count("cat ico") == 1


def test_a_second_launcher_takes_what_is_free_first(config):
    groups = by_training(grid_points(tiny_grid(config)))
    groups[0][0].folder.mkdir(parents=True)
    with folder_lock(groups[0][0].folder):
        waiting = list(groups)
        assert _next(waiting) == (groups[1], False) and waiting == [groups[0], *groups[2:]]
        assert _next([groups[0]]) == (groups[0], True)
    assert _next(list(groups)) == (groups[0], False)


@pytest.mark.slow
def test_two_launchers_share_a_grid_without_waiting_for_each_other(config, tmp_path):
    """While one launcher's group is held up, the other one finishes everything else, and then that group."""
    points = grid_points(tiny_grid(config, "workers=1"))
    held = by_training(points)[0]
    held[0].folder.mkdir(parents=True)
    others = [point for point in points if point not in held]
    done = []
    with folder_lock(held[0].folder):
        launcher = threading.Thread(
            target=run_local, args=(tiny_grid(config, "workers=1"), points, done.append), daemon=True
        )
        launcher.start()
        deadline = time.monotonic() + 120
        while not all(point.result.is_file() for point in others) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert all(point.result.is_file() for point in others) and not held[0].result.is_file()
    launcher.join(60)
    assert all(point.result.is_file() for point in points) and len(done) == len(points)


def test_a_stopped_worker_starts_nothing_more(config):
    group = by_training(grid_points(tiny_grid(config)))[0]
    worker = Worker(threads=1)
    worker.stop()
    assert list(worker.work(group).values()) == ["the worker was stopped"]
    assert not group[0].training.concept_file.exists()


def test_the_queue_is_not_seen_from_a_machine_without_slurm(config, tmp_path, capfd, monkeypatch):
    (tmp_path / "out/tiny").mkdir(parents=True)
    (tmp_path / "out/tiny/jobs.json").write_text('{"cat/ico/0": "7_0"}')
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="no squeue on this machine"):
        run_main("sweep.py", "--config", config, "--status")
    assert "8 waiting" in capfd.readouterr().out


def test_a_line_of_values_is_what_changes_while_all_else_stays():
    """Values travel as data: their texts, such as 1e-05, are nobody's business."""
    settings = [{"no_dci": True}, *({"gain": gain} for gain in (1e-05, 31, 2e6)), {"agg_time": 1, "solver": "plms"}]
    assert varied([(options, i) for i, options in enumerate(settings)]) == {"gain": {1e-05: 1, 31.0: 2, 2e6: 3}}
    product = [({"agg_time": t, "agg_lambda": a}, (t, a)) for t in (0.2, 0.4) for a in (-1, 1)]
    assert varied(product) == {
        "agg_time (agg_lambda=-1)": {0.2: (0.2, -1), 0.4: (0.4, -1)},
        "agg_time (agg_lambda=1)": {0.2: (0.2, 1), 0.4: (0.4, 1)},
        "agg_lambda (agg_time=0.2)": {-1.0: (0.2, -1), 1.0: (0.2, 1)},
        "agg_lambda (agg_time=0.4)": {-1.0: (0.4, -1), 1.0: (0.4, 1)},
    }


@pytest.mark.parametrize("file", sorted((ROOT / "scripts/slurm").glob("*.sbatch")), ids=lambda file: file.stem)
def test_batch_files_say_what_each_resource_is_and_name_no_site(file):
    lines = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    given = dict(re.fullmatch(r"#SBATCH --([a-z-]+)\S*(.*)", line).groups() for line in lines)
    assert {"ntasks", "ntasks-per-node"} & given.keys() and {"gpus-per-node", "cpus-per-task", "mem", "time"} <= given.keys()
    assert [name for name, rest in given.items() if not rest.strip().startswith("# ")] == ["job-name", "output"]
    assert not given.keys() & {"partition", "account", "qos", "constraint", "nodelist", "exclude", "mail-user"}
    assert ("signal" in given) == (file.stem != "evaluate")


def test_patterns_choose_points(config):
    points = grid_points(tiny_grid(config))
    assert [point.name for point in chosen(points, ["c*/ico/1/dci"])] == ["cat/ico/1/dci", "car/ico/1/dci"]
    both = chosen(points, ["car/ico/1/dci", "cat/ico/1/*", "cat/ico/1/dci"])
    assert [point.name for point in both] == [
        p.name for p in points if p.name in ("car/ico/1/dci", "cat/ico/1/plain", "cat/ico/1/dci")
    ]
    assert chosen(points, []) == points
    with pytest.raises(UserError, match=r"no cell is called 'dog/\*'"):
        chosen(points, ["cat/*", "dog/*"])
