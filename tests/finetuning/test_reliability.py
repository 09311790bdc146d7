"""Runs that are stopped, killed, resumed, or shared by several processes."""

import csv
import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, POSIX, ROOT, ok, refused, run, run_here, run_main
from PIL import Image
from safetensors.torch import load_file

from dci import files
from dci.concept.concept_file import Concept
from dci.finetuning import distributed
from dci.finetuning.callbacks import MetricsLogger
from dci.finetuning.checkpoints import Checkpoints, read_checkpoint
from dci.finetuning.config import FinetuneConfig
from ldm import config
from ldm.config import ModelConfig
from ldm.errors import UserError

pytestmark = [pytest.mark.slow, POSIX]

CONFIG = ROOT / "configs/train/ico-tiny.yaml"
SHORT = (
    "--device",
    "cpu",
    "validation.every=0",
    "training.batch_size=4",
    "training.steps=6",
    "training.checkpoint_every=2",
    "logging.every=1",
    "logging.tensorboard=false",
)


def train(logdir, *args):
    run_main("train_ico.py", "--config", CONFIG, "--logdir", logdir, *SHORT, *args)


def losses(run_folder):
    with open(run_folder / "metrics.csv") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    logdir = tmp_path_factory.mktemp("whole")
    train(logdir)
    (folder,) = logdir.iterdir()
    return folder


def send_at(step, number):
    """Return a stand-in for the end of a step that sends this process a signal in one of them."""
    original = MetricsLogger.on_train_batch_end

    def on_train_batch_end(self, trainer, module, *args):
        original(self, trainer, module, *args)
        if module.steps_done == step:
            os.kill(os.getpid(), number)

    return on_train_batch_end


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])  # by name: Windows has no SIGUSR1
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_exactly(whole, tmp_path, capfd, monkeypatch, name):
    number = getattr(signal, name)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(MetricsLogger, "on_train_batch_end", send_at(3, number))
        train(tmp_path)
    assert stop.value.code == 128 + number
    (folder,) = tmp_path.iterdir()
    out = capfd.readouterr().out
    assert f"Stopped at step 3; the last good checkpoint is {folder}/checkpoints/step-000003.ckpt" in out
    assert re.search(rf"go on with: python \S*scripts/train_ico.py --resume {re.escape(str(folder))}", out)
    assert not (folder / "concept.safetensors").exists()
    run_main("train_ico.py", "--resume", folder, "--device", "cpu")
    assert (folder / "concept.safetensors").read_bytes() == (whole / "concept.safetensors").read_bytes()
    assert losses(folder) == losses(whole)
    out = capfd.readouterr().out
    assert f"Going on with {folder} at step 3" in out
    assert f"Use {folder}/concept.safetensors (after 6 steps)" in out
    # Of the checkpoints the last two are left; the interrupted step's has made way.
    assert [f.name for f in sorted((folder / "checkpoints").iterdir())] == ["step-000004.ckpt", "step-000006.ckpt"]


def test_a_signal_before_the_first_step_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dci.finetuning.trainer.ConceptDataset", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM before the first step" in capfd.readouterr().out


def test_repeating_the_command_goes_on(whole, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(MetricsLogger, "on_train_batch_end", send_at(4, signal.SIGUSR1))
        train(tmp_path, "resume=auto")
    train(tmp_path, "resume=auto")
    (folder,) = tmp_path.iterdir()
    assert (folder / "concept.safetensors").read_bytes() == (whole / "concept.safetensors").read_bytes()
    # A finished run is left alone; with more steps it goes on, and equals a run that had them from the start.
    capfd.readouterr()
    train(tmp_path, "resume=auto")
    assert "training:" not in capfd.readouterr().err
    train(tmp_path, "resume=auto", "training.steps=8")
    train(tmp_path / "long", "training.steps=8")
    longer = [load_file(next(p.glob("*/concept.safetensors"))) for p in (tmp_path, tmp_path / "long")]
    assert all(torch.equal(longer[0][name], longer[1][name]) for name in longer[0])
    # Other options are another run.
    train(tmp_path, "resume=auto", "training.seed=5", "training.steps=1")
    assert len(list(tmp_path.glob("*_ico-tiny*"))) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--resume", "RUN", "training.seed=1"), ("training.seed=1, but the run", "has 0")),
        (("--resume", "RUN", "context.suffix=here"), ("context.suffix=here",)),
        (("--resume", "NONE"), ("no run at", "NONE")),
        (("--resume", "auto"), ("--config",)),
        ((), ("--config", "--resume")),
    ],
)
def test_a_run_that_cannot_be_resumed_is_refused(whole, tmp_path, capfd, args, words):
    folders = {"RUN": whole, "NONE": tmp_path}
    args = [folders.get(arg, arg) for arg in args]
    refused(run_here(capfd, "train_ico.py", "--device", "cpu", *args), *[folders.get(word, word) for word in words])


def test_a_resumed_run_keeps_its_images(whole, capfd):
    checkpoint = whole / "checkpoints/step-000006.ckpt"
    content = checkpoint.read_bytes()
    try:
        state = read_checkpoint(checkpoint)
        torch.save({**state, "images": "others"}, checkpoint)
        result = run_here(capfd, "train_ico.py", "--resume", whole, "--device", "cpu", "training.steps=7")
        assert result.returncode == 2
        assert "error: the images or captions have changed" in result.stderr
    finally:
        checkpoint.write_bytes(content)


@pytest.mark.parametrize("odd", ["caf\udce9", "it's #2: a=b, ${HOME} ~"])
def test_a_run_goes_on_where_its_images_and_its_model_have_moved(whole, tmp_path, capfd, odd):
    run_folder, images, model = tmp_path / odd / "run", tmp_path / odd / "images", tmp_path / odd / "model.yaml"
    shutil.copytree(whole, run_folder)
    old = config.load(FinetuneConfig, whole / "configs/config.yaml")
    shutil.copytree(old.data.images, images)
    content = config.load(ModelConfig, old.model)
    content.checkpoint, content.name = str(Path(old.model).parents[2] / content.checkpoint), "another name"
    config.save(content, model)

    def resume(*args):
        return run_here(capfd, "train_ico.py", "--resume", run_folder, "--device", "cpu", *args)

    gone = config.build(FinetuneConfig, dataclasses.asdict(old), ["data.images=/no/such/folder"])
    config.save(gone, run_folder / "configs/config.yaml")
    refused(resume("training.steps=7"), "no folder /no/such/folder", "data.images=FOLDER")
    # Other images, another autoencoder, no path at all: nothing of the run is changed.
    before = (run_folder / "configs/config.yaml").read_bytes()
    others = tmp_path / "others"
    shutil.copytree(images, others)
    Image.new("RGB", (64, 64), "red").save(next(others.iterdir()))
    result = resume(f"data.images={others}", "training.steps=7")
    assert "the images or captions have changed" in result.stderr
    content.latent_scale *= 2
    config.save(content, tmp_path / "scaled.yaml")
    result = resume(f"data.images={images}", f"model={tmp_path / 'scaled.yaml'}", "training.steps=7")
    assert "was trained on another base model" in result.stderr
    refused(resume(f"data.images={images}", "data.regularization=generate"), "data.regularization=generate, but the run")
    assert (run_folder / "configs/config.yaml").read_bytes() == before
    go_on = ("train_ico.py", "--resume", run_folder, "--device", "cpu")
    run_main(*go_on, f"data.images={images}", f"model={model}", "training.steps=7")
    assert Concept.load(run_folder / "concept.safetensors").config["data"]["images"] == str(images)
    # From now on the run knows where they are.
    run_main(*go_on, "training.steps=8")


@pytest.mark.parametrize("options", [(), ("training.lora_rank=2",)])
def test_any_seed_is_one_that_is_chosen_said_and_kept(tmp_path, capfd, options):
    def run_folder():
        train(tmp_path, "training.seed=-1", "training.steps=1", "resume=auto", *options)
        said = re.search(r"Seed: (\d+)\n", capfd.readouterr().out)[1]
        [folder] = tmp_path.iterdir()
        return folder, int(said)

    folder, seed = run_folder()
    assert f"  seed: {seed}\n" in (folder / "configs/config.yaml").read_text()
    assert Concept.load(folder / "concept.safetensors").config["training"]["seed"] == seed
    assert run_folder() == (folder, seed)  # the command repeated goes on with it
    content = (folder / "concept.safetensors").read_bytes()
    train(tmp_path / "again", f"training.seed={seed}", "training.steps=1", *options)
    [again] = (tmp_path / "again").iterdir()
    assert (again / "concept.safetensors").read_bytes() == content
    train(tmp_path / "other", "training.seed=-1", "training.steps=1", *options)
    assert f"Seed: {seed}\n" not in capfd.readouterr().out


def test_several_processes_share_the_seed_that_one_has_chosen(monkeypatch):
    first = distributed.chosen_seed()
    assert first != distributed.chosen_seed()  # of another run
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.chosen_seed() == distributed.chosen_seed()  # as it was inherited
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="training.seed=-1 would be another seed in each of the 2 processes"):
        distributed.chosen_seed()


def test_a_broken_checkpoint_is_passed_over(whole, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        checkpoints.save(step, {"images": ""})
    (tmp_path / "step-000003.ckpt").write_bytes(b"half")
    with pytest.raises(UserError, match="step-000003.ckpt is not a whole checkpoint"):
        read_checkpoint(tmp_path / "step-000003.ckpt")
    with pytest.raises(UserError, match="not a whole checkpoint|not a checkpoint to resume from"):
        read_checkpoint(ROOT / "data/tiny/vae.safetensors")
    assert read_checkpoint(checkpoints.files()[1])["step"] == 2


def test_the_last_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3, 10):
        checkpoints.save(step, {})
    assert [f.name for f in checkpoints.files()] == ["step-000003.ckpt", "step-000010.ckpt"]
    # A run taken up again from further back leaves no checkpoint of the other future.
    checkpoints.save(5, {})
    assert checkpoints.latest().name == "step-000005.ckpt"


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_checkpoint(whole, tmp_path, capfd, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if "step-000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT)
    (folder,) = tmp_path.iterdir()
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "No space left on device" in line
    assert f"{folder}/checkpoints/step-000002.ckpt" in line
    assert f"--resume {folder}" in line
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    run_main("train_ico.py", "--resume", folder, "--device", "cpu")
    assert (folder / "concept.safetensors").read_bytes() == (whole / "concept.safetensors").read_bytes()


def test_a_full_disk_leaves_the_configuration_of_a_resumed_run(whole, capfd, monkeypatch):
    """It is written again when a run goes on; the old one stays until the new one is whole."""
    before = (whole / "configs/config.yaml").read_bytes()

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        result = run_here(capfd, "train_ico.py", "--resume", whole, "--device", "cpu", "training.steps=7")
    assert result.returncode == 2
    assert "config.yaml: No space left on device" in result.stderr
    assert (whole / "configs/config.yaml").read_bytes() == before


def test_tensorboard_on_a_full_disk_prints_no_traceback(tmp_path, capfd, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", write)
    result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT, "logging.tensorboard=true")
    assert result.returncode == 2
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path, capfd, monkeypatch):
    original = MetricsLogger.on_train_batch_end

    def spoil(self, trainer, module, *args):
        original(self, trainer, module, *args)
        if module.steps_done == 3:
            next(iter(module.keys_values.values())).data.fill_(float("nan"))

    monkeypatch.setattr(MetricsLogger, "on_train_batch_end", spoil)
    result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "the loss is nan at step 4" in line
    assert "step-000002.ckpt" in line
    assert not list(tmp_path.glob("*/concept.safetensors"))


def test_weights_beyond_fp16_are_not_saved(tmp_path, capfd, monkeypatch):
    original = MetricsLogger.on_train_batch_end

    def spoil(self, trainer, module, *args):
        original(self, trainer, module, *args)
        if module.steps_done == 4:
            next(iter(module.keys_values.values())).data[0, 0] = 1e6

    monkeypatch.setattr(MetricsLogger, "on_train_batch_end", spoil)
    result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT)
    assert result.returncode == 2
    assert "attn2.to_k.weight has values that are not finite, or beyond fp16, after step 4" in result.stderr
    assert [f.name for f in tmp_path.glob("*/checkpoints/*")] == ["step-000002.ckpt"]


@pytest.mark.parametrize(
    "options",
    [
        ("training.batch_size=5", "training.micro_batch=2"),
        ("training.batch_size=2", "training.micro_batch=1", "training.trainable=none"),
    ],
)
def test_micro_batches_that_do_not_divide_a_batch_or_reach_nothing(tmp_path, options):
    """Five images go one at a time; captions alone, which train nothing in a frozen UNet, are no error."""
    others = tmp_path / "cats"
    others.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(others / f"{i}.png")
        (others / f"{i}.txt").write_text("a cat")
    train(tmp_path / "logs", "training.steps=2", *options, f"data.regularization={others}")
    assert len(list(tmp_path.glob("logs/*/concept.safetensors"))) == 1


def test_a_concept_that_no_step_has_seen_is_named(tmp_path, capfd):
    config = ROOT / "configs/train/ico-joint-tiny.yaml"
    result = run_here(
        capfd, "train_ico.py", "--config", config, "--logdir", tmp_path, *SHORT, "training.batch_size=1", "training.steps=1"
    )
    assert result.returncode == 2
    assert re.search(r"error: training has not reached <new\d>, <new\d>: give more steps", result.stderr)
    assert not list(tmp_path.glob("*/concept.safetensors"))
    # Nor does taking the run up again, with no step left, make it so; more steps do.
    (folder,) = tmp_path.iterdir()
    again = run_here(capfd, "train_ico.py", "--resume", folder, "--device", "cpu")
    assert (again.returncode, "has not reached" in again.stderr) == (2, True)
    run_main("train_ico.py", "--resume", folder, "--device", "cpu", "training.steps=10")
    assert (folder / "concept.safetensors").is_file()


def test_two_processes_train_into_one_folder_only_in_turn(whole, capfd):
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=1); input()"
    command = [sys.executable, "-c", script, str(whole / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused(run_here(capfd, "train_ico.py", "--resume", whole, "--device", "cpu", "training.steps=9"), "another process")
        other.stdin.write("\n")


def test_one_and_two_processes_have_the_same_loss_curve(tmp_path):
    """Contexts of images that a process does not see included; the first process alone writes."""
    # The same micro-batches for both: matrix products of other shapes round differently.
    options = ("training.steps=20", "training.save_every=20", "training.micro_batch=2")
    # Both as programs: what other tests did to this process has no part in it.
    ok(run("train_ico.py", "--config", CONFIG, "--logdir", tmp_path / "one", *SHORT, *options))
    out = run("train_ico.py", "--config", CONFIG, "--logdir", tmp_path / "two", *SHORT, *options, "training.devices=2")
    assert ok(out).count("Run folder") == 1
    (one,), (two,) = ((tmp_path / n).iterdir() for n in ("one", "two"))
    expected, found = losses(one), losses(two)
    assert list(expected) == list(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-5)
    first, second = (Concept.load(f / "concept.safetensors") for f in (one, two))
    torch.testing.assert_close(second.prefixes, first.prefixes, rtol=1e-4, atol=1e-6)
    assert sorted(f.name for f in two.rglob("*") if f.is_file()) == sorted(f.name for f in one.rglob("*") if f.is_file())


@pytest.mark.parametrize("command", [["-m", "dci"], ["dci"]], ids=["module", "installed"])
def test_the_command_dci_starts_its_other_processes(command, tmp_path):
    """As a module, and as pip's file of that name."""
    (tmp_path / "dci").write_text("import sys\nfrom dci.cli.main import main\nsys.exit(main())\n")
    given = ["train", "--config", str(CONFIG), "--logdir", "logs", *SHORT, "training.steps=2", "training.devices=2"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, *command, *given]
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ok(result).count("Run folder") == 1
    (folder,) = (tmp_path / "logs").iterdir()
    assert list(losses(folder)) == [1, 2]


def test_several_concepts_are_learned_together(tmp_path):
    config = tmp_path / "joint.yaml"
    config.write_text(
        CONFIG.read_text()
        .replace("concept:\n  class_noun: cat\n  initial_words: [ktn, pll]\n", "")
        .replace(
            "data:\n  images: data/concepts/cat\n",
            f"concepts:\n- {{class_noun: cat, images: {ROOT}/data/concepts/cat}}\n"
            f"- {{class_noun: car, images: {ROOT}/data/concepts/car, initial_words: [pll, ucd]}}\n",
        )
    )
    run_main(
        "train_ico.py",
        "--config",
        config,
        "--logdir",
        tmp_path / "logs",
        *SHORT,
        "training.steps=2",
        f"model={ROOT}/configs/model/tiny.yaml",
    )
    (file,) = tmp_path.glob("logs/*/concept.safetensors")
    concept = Concept.load(file)
    assert concept.names == ((("<new1>",), "cat"), (("<new2>", "<new3>"), "car"))
    assert concept.prefixes.shape == (10, 3, 128)
