"""Images dropped to learn from, and the queue that learns."""

import struct
import sys
import time
import zlib
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from dci.app import jobs as queue
from dci.app import reference_set
from dci.app.jobs import Jobs
from dci.app.reference_set import collect, keep, plain_name
from dci.app.running import Running
from ldm.errors import UserError

CAT = sorted((ROOT / "data/concepts/cat").glob("*.png"))


def test_images_are_shown_as_training_sees_them(tmp_path):
    from dci.finetuning.config import DataConfig
    from dci.finetuning.images import read_references
    from ldm.images import to_images

    found = collect(CAT, 64, False, tmp_path)
    seen = read_references(ROOT / "data/concepts/cat", DataConfig(), 64)
    assert [square.tobytes() for square in found.squares] == [to_images(p.pixels[None])[0].tobytes() for p in seen]
    assert found.show().count("<img") == 5


def test_masks_are_shown_where_they_count(tmp_path):
    files = []
    for i in range(3):
        image = Image.open(CAT[i]).convert("RGBA")
        image.putalpha(Image.new("L", image.size, 255))
        image.paste((0, 0, 0, 0), (0, 0, 40, 40))
        image.save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    assert collect(files, 64, True, tmp_path).show().count("<img") == 6
    assert collect(files, 64, False, tmp_path).masks == [None] * 3
    with pytest.raises(UserError, match="no mask for 00.png"):
        collect(CAT, 64, True, tmp_path)


@pytest.mark.parametrize("number", [1, 2, 21])
def test_too_few_and_too_many_are_refused(tmp_path, number):
    files = []
    for i in range(number):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8)).save(files[-1])
    with pytest.raises(UserError, match=f"{number} image"):
        collect(files, 64, False, tmp_path)
    assert not list((tmp_path / "sets").iterdir())


def test_a_text_named_png_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "notes.png").write_text("these are notes")
    with pytest.raises(UserError) as refusal:
        collect([*CAT, tmp_path / "notes.png"], 64, False, tmp_path)
    assert str(refusal.value).startswith("notes.png is not a readable image")
    assert not list((tmp_path / "sets").iterdir())


def test_an_image_that_claims_billions_of_pixels_is_not_opened(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    with pytest.raises(UserError, match="bomb.png has more than"):
        collect([*CAT, tmp_path / "bomb.png"], 64, False, tmp_path)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("../../etc/passwd", "passwd"),
        ("..", "image"),
        ("a b.png", "a-b.png"),
        ("/x/.hidden.png", "hidden.png"),
        ("C:\\x\\cat.png", "cat.png"),
        ("x" * 300 + ".png", "x" * 76 + ".png"),
        ("-rf.png", "rf.png"),
    ],
)
def test_names_are_made_safe(name, plain):
    assert plain_name(name) == plain


def test_a_set_is_kept_for_the_run(tmp_path):
    found = collect(CAT, 64, False, tmp_path)
    kept = keep(found.folder, tmp_path / "logs", "ico-cat")
    assert [file.read_bytes() for file in sorted(kept.iterdir())] == [file.read_bytes() for file in CAT]
    assert kept.parent == tmp_path / "logs/references"


PROGRAM = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]) / f"2026_{sys.argv[2]}"
(folder / "configs").mkdir(parents=True, exist_ok=True); (folder / "checkpoints").mkdir(exist_ok=True)
(folder / "configs/config.yaml").touch()
def stop(*_):
    (folder / "checkpoints/step-000001.ckpt").touch(); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if sys.argv[3] == "fail": sys.exit("error: something was wrong")
(folder / "metrics.csv").write_text("step,loss,learning_rate\\n1,0.5,0.1\\n")
print("training: 5%", flush=True)
while sys.argv[3] == "long": time.sleep(0.02)
(folder / "concept.safetensors").touch()
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The queue, with a program in place of the training one that makes the same files."""
    popen = queue.subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", PROGRAM, str(tmp_path / "logs"), *command[-2:]], **options)

    monkeypatch.setattr(queue.subprocess, "Popen", start)
    found = Jobs(tmp_path / "logs", tmp_path)
    yield found
    found.close()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_trains_at_a_time_and_the_next_follows(jobs):
    first, second = jobs.submit(["a", "long"], "a", 10), jobs.submit(["b", "short"], "b", 10)
    until(lambda: queue.losses(first))
    assert (first.state, second.state, jobs.waiting()) == ("running", "waiting", 1)
    assert queue.losses(first) == [(1, 0.5)]
    jobs.stop()
    until(lambda: second.state == "finished")
    assert first.state == "stopped"
    assert [folder.name for folder in jobs.resumable()] == ["2026_a"]


def test_a_failure_is_told_in_the_programs_words(jobs):
    job = jobs.submit(["a", "fail"], "a", 10)
    until(lambda: job.state == "failed")
    assert job.message == "something was wrong"


def test_few_may_wait(jobs):
    job = jobs.submit(["a", "long"], "a", 10)
    until(lambda: job.folder is not None)
    with pytest.raises(UserError, match="being trained"):
        jobs.submit(["a", "short"], "a", 10, job.folder)
    for name in "bcd":
        jobs.submit([name, "short"], name, 10)
    with pytest.raises(UserError, match="3 trainings wait"):
        jobs.submit(["e", "short"], "e", 10)


def test_closing_the_server_leaves_a_checkpoint(jobs):
    job = jobs.submit(["a", "long"], "a", 10)
    until(lambda: queue.losses(job))
    jobs.close()
    assert (job.state, job.process.returncode) == ("stopped", 143)
    assert Path(job.folder, "checkpoints/step-000001.ckpt").exists()


def test_giving_up_ends_what_was_pressed_before_and_nothing_after():
    running = Running(most=2)
    first, second = running.press(), running.press()
    running.stop("me")
    third = running.press()
    assert [running.given_up("me", press)() for press in (first, second, third, None)] == [True, True, False, False]
    assert not running.given_up("somebody else", first)()
    for name in "abc":
        running.stop(name)
    assert not running.given_up("me", first)()  # so many clients are remembered, and no more


def test_a_claimed_size_counts_in_every_format(tmp_path, monkeypatch):
    """HEIC is known to Pillow only once the reader has met it: its size is asked through the reader."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic")
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setattr(reference_set, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(UserError, match="a.heic has more than"):
        collect([tmp_path / "a.heic"], 64, False, tmp_path / "scratch")
