"""The batch files and the sweep against a real Slurm of one node: limits, requeues, cancelled jobs, arrays.

It is started for these tests, in a folder of theirs; they are skipped where it cannot run.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ok, run
from PIL import Image


def why_not():
    """Why no Slurm can be started here."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:  # Windows has none
        return "Slurm's daemons need root"
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (tests/slurm/install.sh)" if missing else None


pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NODE = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=4G")  # in place of a GPU machine's resources
STEPS = 40
TRAINING = (
    "--device",
    "cpu",
    f"training.steps={STEPS}",
    "training.batch_size=2",
    "training.checkpoint_every=null",
    "logging.every=1",
    "logging.tensorboard=false",
)
QUICK = ("--config", "configs/train/ico-tiny.yaml", *TRAINING, "validation.every=0")


def output_of(*command):
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def submit(log, *args):
    return output_of("sbatch", "--parsable", f"--output={log}", *NODE, *args)


def wait_for(what, condition, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds} s; squeue:\n{output_of('squeue', '-r')}")


def info(job, name):
    """A field of what Slurm knows about a job."""
    fields = output_of("scontrol", "show", "job", job).split()
    return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))


def is_on_node(job, step=""):
    """Whether the node has a process of the job, or of a step of it; while it has, the job is not launched there again."""
    step = f"slurmstepd: [{info(job, 'JobId')}.{step}"
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if file.read_text().startswith(step):
                return True
    return False


def start_now(job, *changes):
    """Requeued jobs wait for two minutes, in which their processes end; the tests do not wait as long.

    A node notes in whole seconds when it took a job's credential back, and may refuse one made within the same second.
    """
    wait_for("requeued", lambda: info(job, "JobState") == "PENDING" and not is_on_node(job))
    time.sleep(5)
    output_of("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)


def daemons():
    """The last lines of the logs of Slurm's daemons: why a job was not launched stands nowhere else."""
    logs = Path(os.environ["SLURM_CONF"]).parent / "log"
    return "\n".join(
        f"{name}: {line}" for name in ("ctld", "slurmd") for line in (logs / f"{name}.log").read_text().splitlines()[-12:]
    )


def limit_soon(job):
    """A time limit in minutes that leaves a running job between one and two of them."""
    hours, minutes, _ = map(int, info(job, "RunTime").split(":"))
    return hours * 60 + minutes + 2


def finished(job):
    state = info(job, "JobState")
    if state in ("FAILED", "TIMEOUT", "NODE_FAIL"):
        log = Path(info(job, "StdOut"))
        words = log.read_text() if log.is_file() else f"{log} was not written"
        raise AssertionError(f"{state}, exit code {info(job, 'ExitCode')}; {words}\n{daemons()}")
    return state == "COMPLETED"


def steps(logdir):
    """How many steps the run in a log folder has made."""
    files = list(logdir.glob("*/metrics.csv"))
    assert len(files) < 2, "a second run was begun in place of the first"
    return int(list(csv.DictReader(files[0].open()))[-1]["step"]) if files else 0


def concept(logdir):
    (file,) = logdir.glob("*/concept.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running Slurm; sbatch and its like find it through the environment."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["bash", HERE / "start.sh", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            # Jobs inherit the environment: this Python, no hub, and as many threads everywhere.
            patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            for name, value in (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")):
                patch.setenv(name, value)
            yield
    finally:
        subprocess.run(["bash", HERE / "stop.sh", folder])


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """The concept file of a run that nothing disturbs, as a job of its own."""
    logdir = tmp_path_factory.mktemp("whole")
    job = submit(logdir / "log", "scripts/slurm/train_ico.sbatch", *QUICK, "--logdir", logdir)
    wait_for("the whole run", lambda: finished(job))
    return concept(logdir)


def write_config(file, **validation):
    content = yaml.safe_load((ROOT / "configs/train/ico-tiny.yaml").read_text())
    content["model"], content["data"]["images"] = str(ROOT / content["model"]), str(ROOT / content["data"]["images"])
    content["validation"] |= validation
    file.write_text(yaml.safe_dump(content))


def test_a_job_near_its_limit_queues_itself_again_and_ends_the_same(whole, tmp_path):
    log, config = tmp_path / "log", tmp_path / "config.yaml"
    # Images between the steps only take time: enough for Slurm to notice, within 30 seconds, that a limit is near.
    write_config(config, every=1)
    job = submit(log, "--time=10", "scripts/slurm/train_ico.sbatch", "--config", config, *TRAINING, "--logdir", tmp_path)
    wait_for("the first steps", lambda: steps(tmp_path) >= 2)
    # The signal comes 120 to 150 seconds before the limit: now.
    output_of("scontrol", "update", f"JobId={job}", f"TimeLimit={limit_soon(job)}")
    wait_for("the signal", lambda: "Stopped at step" in log.read_text())
    assert steps(tmp_path) < STEPS
    write_config(config, every=0)
    start_now(job, "TimeLimit=10")
    wait_for("the end", lambda: finished(job))
    assert info(job, "Restarts") == "1"
    assert "Going on with" in log.read_text()
    assert concept(tmp_path) == whole


def test_requeue_and_cancel_lose_nothing(whole, tmp_path):
    log, command = tmp_path / "log", ("scripts/slurm/train_ico.sbatch", *QUICK, "--logdir", tmp_path)
    job = submit(log, *command)
    wait_for("the first steps", lambda: steps(tmp_path) >= 3)
    output_of("scontrol", "requeue", job)
    start_now(job)
    reached = steps(tmp_path)
    assert 3 <= reached < STEPS
    wait_for("more steps", lambda: steps(tmp_path) > reached)
    output_of("scancel", job)
    wait_for("cancelled", lambda: info(job, "JobState") == "CANCELLED")
    wait_for("ended", lambda: not output_of("squeue", "-h", "-j", job))
    assert reached < steps(tmp_path) < STEPS
    job = submit(log, *command)
    wait_for("the end", lambda: finished(job))
    assert log.read_text().count("Going on with") == 2
    assert concept(tmp_path) == whole


def test_two_processes_share_a_run_and_a_list_of_concepts_is_an_array(slurm, tmp_path):
    folders = {name: ROOT / "data/concepts" / name for name in ("cat", "car")}
    (tmp_path / "list").write_text("".join(f"my{name}\t{name}\t{folder}\n" for name, folder in folders.items()))
    job = submit(
        tmp_path / "log-%a",
        "--array=2",
        "--ntasks-per-node=2",
        "scripts/slurm/train_many.sbatch",
        tmp_path / "list",
        *QUICK,
        "training.steps=3",
        "--logdir",
        tmp_path,
    )
    wait_for("the end", lambda: finished(job))
    (run,) = tmp_path.glob("*_mycar")
    config = (run / "configs/config.yaml").read_text()
    assert "class_noun: car" in config and "devices: 2" in config
    assert (run / "concept.safetensors").is_file()
    assert "GLOBAL_RANK: 0, MEMBER: 1/2" in (tmp_path / "log-2").read_text()


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a {}\na {} on the beach\na {} in the snow\n")
    return file


def pixels(folder):
    return {file.name: Image.open(file).tobytes() for file in sorted((folder / "samples").glob("*.png"))}


def test_an_array_of_shards_makes_the_images_of_one_process(slurm, tmp_path, prompts):
    trained = tmp_path / "trained"
    ok(run("train_ico.py", *QUICK, "training.steps=1", "--logdir", trained))
    (file,) = trained.glob("*/concept.safetensors")
    options = (
        "--concept",
        file,
        "--from-file",
        prompts,
        "--n-samples",
        6,
        "--batch-size",
        2,
        "--steps",
        15,
        "--device",
        "cpu",
        "--outdir",
    )
    one, several, report = tmp_path / "one", tmp_path / "several", tmp_path / "report"
    array = submit(tmp_path / "log-%a", "--array=1-3", "--hold", "scripts/slurm/sample_dci.sbatch", *options, several)
    for share in (1, 2):  # the last one waits until it is to be disturbed, or it would be done by then
        output_of("scontrol", "release", f"{array}_{share}")
    evaluation = submit(
        tmp_path / "log-evaluate",
        f"--dependency=afterok:{array}",
        "scripts/slurm/evaluate.sbatch",
        "--samples",
        several,
        "--references",
        ROOT / "data/concepts/cat",
        "--out",
        report,
    )
    # Two shards are disturbed: one is queued again from outside, one queues itself, and none but itself, on the signal.
    wait_for("pictures", lambda: list((several / "samples").glob("*.png")))
    output_of("scontrol", "requeue", f"{array}_1")
    start_now(f"{array}_1")
    output_of("scontrol", "release", f"{array}_3")
    wait_for("the last shard", lambda: info(f"{array}_3", "JobState") == "RUNNING" and is_on_node(f"{array}_3", "0"))
    time.sleep(1)  # the step's program has begun: a signal before that would be lost
    # scancel would repeat itself while the job is on its way back into the queue.
    subprocess.run(["timeout", "2", "scancel", "--signal=USR1", f"{array}_3"], capture_output=True)
    start_now(f"{array}_3")
    wait_for("the end", lambda: set(states(array)) == {"COMPLETED"})
    assert [info(f"{array}_{shard}", "Restarts") for shard in (1, 2, 3)] == ["1", "0", "1"]
    ok(run("sample_dci.py", *options, one))
    assert len(pixels(one)) == 18
    assert pixels(several) == pixels(one)
    wait_for("the report", lambda: finished(evaluation))
    assert (report / "report.html").is_file()


def states(array):
    shown = output_of("scontrol", "show", "job", array).split()
    return [field.partition("=")[2] for field in shown if field.startswith("JobState=")]


def worker_of(training):
    """The process that has begun a training, as soon as its run folder is there."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if json.dumps(str(training)) in file.read_text() and list(training.glob("*_*")):
                return int((file.parent / "stat").read_text().rpartition(")")[2].split()[1])
    return None


def test_the_sweep_tiny_is_the_same_on_slurm_and_here(slurm, tmp_path):
    """On Slurm a worker is killed, the others go on, and a second call completes it."""
    # One of the two concepts and seeds, for time; all: python -m pytest tests/slurm -k sweep with SWEEP=whole.
    whole = os.environ.get("SWEEP") == "whole"
    names, seeds = ["cat", "car"] if whole else ["cat"], [0, 1] if whole else [0]
    cells = 2 * len(names) * len(seeds)
    concepts = ", ".join(f"{{class_noun: {name}, images: data/concepts/{name}}}" for name in names)
    options = (
        "--config",
        "configs/sweep/tiny.yaml",
        f"concepts=[{concepts}]",
        f"seeds={seeds}",
        "workers=2",
        "slurm={gpus_per_node: 0, cpus_per_task: 1, mem: 2GB}",
    )
    commands = {
        cluster: [sys.executable, "scripts/sweep.py", *options, f"cluster={cluster}", f"outdir={tmp_path / cluster}"]
        for cluster in ("slurm", "local")
    }
    tables = {cluster: tmp_path / cluster / "tiny/results.csv" for cluster in commands}
    with subprocess.Popen(commands["slurm"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        place = f"cat/ico/{seeds[0]}"
        worker = wait_for("a training", lambda: worker_of(tmp_path / "slurm/tiny/trainings" / place))
        os.kill(worker, signal.SIGKILL)
        said = first.communicate(timeout=900)[1]
    assert first.returncode == 1
    assert f"failed: {place}/dci: the worker was killed; before: " in said
    assert f"failed: 1 of {cells} cells" in said
    rows = tables["slurm"].read_text().splitlines()
    assert len(rows) == cells and not any(row.startswith(f"cat,ico,{seeds[0]},") for row in rows)
    for command in commands.values():
        output_of(*command)
    assert tables["slurm"].read_bytes() == tables["local"].read_bytes()
    assert len(tables["slurm"].read_text().splitlines()) == 1 + cells
    assert json.loads((tmp_path / "slurm/tiny/jobs.json").read_text()).keys() == {
        f"{name}/{method}/{seed}" for name in names for method in ("ico", "custom-diffusion") for seed in seeds
    }
    assert os.path.isfile(tmp_path / "slurm/tiny/report/report.html")
