"""Drawing many prompts: plans, shards, locks, workers that are killed, and what a repeated command does."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import POSIX, ROOT, mostly_slow, pixels, refused, run_here, run_main
from PIL import Image

from dci.finetuning.config import ConceptConfig, FinetuneConfig
from dci.finetuning.module import ICOTraining
from dci.samples.file_locks import FileLocks
from dci.samples.image_metadata import PromptMetadata, SamplingMetadata
from dci.samples.plan import Plan
from dci.samples.worker import sample_missing
from dci.samples.writer import SampleFolder
from ldm.errors import UserError
from ldm.text_to_image import SamplingOptions

SETTINGS = SamplingOptions(steps=4, width=16, height=16)


def plan(prompts=("a dog", "a car", "a cat"), seeds=(0, 5), n_samples=3, batch_size=4, **settings):
    metadata = SamplingMetadata(options=replace(SETTINGS, **settings))
    return Plan([PromptMetadata(prompt) for prompt in prompts], metadata, list(seeds), n_samples, batch_size)


def paint(images):
    """Stands in for a model: colours tell the image, and a corner tells all that its batch holds."""
    batch = torch.tensor([[p.prompt, p.seed, p.number] for p in images]).float()
    rows = (batch / 10)[:, :, None, None].repeat(1, 1, 16, 16)
    rows[:, :, 0, 0] = batch.square().sum(0) / 1000
    return rows


def fill(outdir, plan, shard=(1, 1), sample=paint, append=False):
    with SampleFolder(outdir, plan, append) as folder:
        sample_missing(folder, plan.batches(*shard), sample, lambda numbers, here: None)


def contents(folder):
    """Everything that a user sees in a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".locks"}


def in_process(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


@pytest.fixture
def whole(tmp_path):
    fill(tmp_path / "whole", plan())
    return contents(tmp_path / "whole")


def test_a_plan_numbers_every_image_once():
    made = plan()
    numbers = [number for shard in (1, 2, 3) for batch in made.batches(shard, 3) for number in batch]
    assert sorted(numbers) == list(range(len(made))) == list(range(18))
    assert [made.image(n) for n in (0, 2, 3, 6, 17)] == [(0, 0, 0), (0, 0, 2), (0, 5, 0), (1, 0, 0), (2, 5, 2)]
    assert [len(batch) for batch in made.batches()] == [4, 4, 4, 4, 2]
    assert made.batches(7, 8) == []


def test_a_folder_holds_images_and_metadata(whole, tmp_path):
    record = json.loads(whole["prompts.json"])
    assert list(record) == [f"{n:05}" for n in range(18)]
    assert sorted(whole) == sorted(
        [*(f"samples/{stem}.png" for stem in record), "prompts.json", "grid.png", "grid-00006.png", "grid-00012.png"]
    )
    entry = record["00011"]
    assert (entry["prompt"], entry["seed"], entry["index"], entry["steps"]) == ("a car", 5, 2, 4)
    image = Image.open(tmp_path / "whole/samples/00011.png")
    assert image.getpixel((8, 8)) == tuple(round((x / 10 + 1) * 127.5) for x in (1, 5, 2))
    assert image.text["parameters"].startswith("a car\nSteps: 4, Sampler: DDIM, CFG scale: 6.0, Seed: 5, Size: 16x16")
    assert Image.open(tmp_path / "whole/grid.png").size == (3 * 18 - 2, 2 * 18 - 2)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_make_what_one_process_makes(whole, tmp_path, order):
    for k in order:
        fill(tmp_path / "shards", plan(), (k, 3))
    assert contents(tmp_path / "shards") == whole
    for k in order:
        fill(tmp_path / f"own-{k}", plan(), (k, 3))
    images = [f for k in order for f in (tmp_path / f"own-{k}/samples").iterdir()]
    assert len(images) == 18
    assert all(f.read_bytes() == whole[f"samples/{f.name}"] for f in images)


def test_only_what_is_missing_is_made_again(whole, tmp_path):
    folder = tmp_path / "whole"
    for name in ("samples/00001.png", "samples/00016.png", "grid-00006.png"):
        (folder / name).unlink()
    half = folder / "samples/00009.png"
    half.write_bytes(half.read_bytes()[:-20])
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    drawn = []
    fill(folder, plan(), sample=lambda images: (drawn.append(len(images)), paint(images))[1])
    assert drawn == [4, 4, 2]  # whole batches
    assert contents(folder) == whole
    kept = [f for f in before if f.parent.name == "samples" and f != half]
    assert len(kept) == 15
    assert all(f.stat().st_mtime_ns == before[f] for f in kept)
    fill(folder, plan(), sample=None)
    assert contents(folder) == whole


def killed_in_the_third_batch(folder):
    def sample(images):
        if images[0].prompt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return paint(images)

    fill(folder, plan(), sample=sample)


@POSIX
def test_a_killed_worker_damages_nothing_and_blocks_nobody(whole, tmp_path):
    folder = tmp_path / "killed"
    process = in_process(killed_in_the_third_batch, folder)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for file in (folder / "samples").glob("*.png"):
        Image.open(file).load()
    assert (folder / "prompts.json").read_bytes() == whole["prompts.json"]
    # What it may have been writing at that moment.
    for name in ("samples/.00008.png.1234.tmp", ".prompts.json.1234.tmp"):
        (folder / name).write_bytes(b"half")
    fill(folder, plan())
    assert contents(folder) == whole


def slow_worker(folder, log, gate, shard):
    def sample(images):
        with open(log, "a") as file:
            file.write(f"{images[0]}\n")
        time.sleep(0.05)
        return paint(images)

    gate.wait()
    fill(folder, plan(batch_size=1), shard, sample)


@pytest.mark.parametrize("shards", mostly_slow([[(1, 1)] * 3, [(1, 2), (2, 2), (1, 1)]], [(1, 1)] * 3))
@POSIX
def test_workers_at_once_share_the_work(tmp_path, shards):
    fill(tmp_path / "alone", plan(batch_size=1))
    gate = multiprocessing.get_context("fork").Barrier(len(shards))
    workers = [in_process(slow_worker, tmp_path / "o", tmp_path / "log", gate, shard) for shard in shards]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert contents(tmp_path / "o") == contents(tmp_path / "alone")
    drawn = (tmp_path / "log").read_text().splitlines()
    assert len(drawn) == len(set(drawn)) == 18


@POSIX
def test_a_claim_is_exclusive_until_its_process_ends(tmp_path):
    def claim(ready, end):
        assert FileLocks(tmp_path / "locks").acquire(range(4, 8))
        ready.set()
        end.wait()

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = in_process(claim, ready, end)
    ready.wait()
    locks = FileLocks(tmp_path / "locks")
    assert locks.acquire(range(0, 4))
    assert not locks.acquire(range(6, 10))
    other.kill()
    other.join()
    assert locks.acquire(range(6, 10))
    locks.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (plan(steps=5), "'steps' of 00000 is 4 there and 5 here"),
        (plan(["a dog", "a bus", "a cat"]), '\'prompt\' of 00006 is "a car" there and "a bus" here'),
        (plan(n_samples=4), "'seed' of 00003 is 5 there and 0 here"),
        (plan(seeds=[0]), '\'prompt\' of 00003 is "a dog" there and "a car" here'),
    ],
)
def test_other_images_are_not_mixed_in(whole, tmp_path, other, words):
    with pytest.raises(UserError) as error:
        SampleFolder(tmp_path / "whole", other)
    assert f"whole holds other images: {words}; give another folder" in str(error.value)
    assert contents(tmp_path / "whole") == whole


def test_images_of_unknown_origin_are_not_mixed_in(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "samples/00002.png")
    with pytest.raises(UserError, match="does not tell what 00002.png"):
        SampleFolder(tmp_path, plan())
    fill(tmp_path, plan(["a dog"], [0], 2), append=True)
    assert sorted(f.stem for f in (tmp_path / "samples").iterdir()) == ["00002", "00003", "00004"]
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(UserError, match="not a record"):
        SampleFolder(tmp_path, plan())


def test_single_prompts_are_appended_and_repeated_ones_found(tmp_path):
    for prompt, batch_size in (("a dog", 2), ("a car", 2), ("a dog", 2), ("a car", 2), ("a dog", 1)):
        fill(tmp_path, plan([prompt], [0], 3, batch_size), append=True)
    record = json.loads((tmp_path / "prompts.json").read_text())
    assert [(r["prompt"], r["index"], r["batch_size"]) for r in record.values()] == [
        (prompt, i, size) for prompt, size in (("a dog", 2), ("a car", 2), ("a dog", 1)) for i in range(3)
    ]
    assert len(list((tmp_path / "samples").iterdir())) == 9
    assert {f.name for f in tmp_path.glob("grid*")} == {"grid.png", "grid-00003.png", "grid-00006.png"}


def test_a_longer_file_adds_to_a_folder(whole, tmp_path):
    fill(tmp_path / "whole", plan(["a dog", "a car", "a cat", "a bus"], batch_size=3))
    fill(tmp_path / "fresh", plan(["a dog", "a car", "a cat", "a bus"]))
    now = contents(tmp_path / "whole")
    assert now.keys() == contents(tmp_path / "fresh").keys()
    assert all(now[name] == content for name, content in whole.items() if name.startswith("samples"))


def test_a_full_disk_loses_nothing_that_was_sampled(tmp_path, monkeypatch):
    from dci.samples import writer

    def write(path, content, write=writer.write_atomically):
        if path.name == "00005.png":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomically", write)
        with pytest.raises(OSError, match="00005.png"):
            fill(tmp_path, plan())
    assert {f"{n:05}.png" for n in range(5)} <= {f.name for f in (tmp_path / "samples").iterdir()}
    fill(tmp_path, plan())
    assert len(list((tmp_path / "samples").iterdir())) == 18


# The programs, with the embedded model.


@pytest.fixture(scope="module")
def concept(tiny_base, tmp_path_factory):
    """A concept file that differs from its base."""
    import copy

    module = ICOTraining(copy.deepcopy(tiny_base), FinetuneConfig(concept=ConceptConfig(class_noun="cat")), images=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    file = tmp_path_factory.mktemp("concept") / "concept.safetensors"
    module.concept().save(file)
    return file


PROMPTS = "\ufeffa {} on the beach\r\n\r\n  V* in a red street at night\r\na V* cat\u2028in the snow\r\n"


@pytest.mark.slow
def test_a_prompt_file_is_sampled_alike_by_shards(concept, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(PROMPTS.encode())
    common = (
        "--concept",
        concept,
        "--from-file",
        tmp_path / "prompts.txt",
        "--steps",
        4,
        "--seeds",
        "3,7-8",
        "--n-samples",
        1,
        "--batch-size",
        2,
    )
    run_main("sample_dci.py", *common, "--outdir", tmp_path / "one")
    for k in (2, 1):
        run_main("sample_dci.py", *common, "--outdir", tmp_path / "two", "--shard", f"{k}/2")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    record = json.loads((tmp_path / "one/prompts.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in record.values()] == [
        (prompt, seed)
        for prompt in ("a {} on the beach", "V* in a red street at night", "a V* cat\u2028in the snow")
        for seed in (3, 7, 8)
    ]
    assert record["00000"]["concept_prompt"] == "a <new1> <new2> cat on the beach"
    alone = ("--concept", concept, "--prompt", "V* in a red street at night", "--steps", 4, "--seed", 8, "--n-samples", 1)
    run_main("sample_dci.py", *alone, "--outdir", tmp_path / "alone")
    assert np.abs(pixels(tmp_path / "alone/samples/00000.png") - pixels(tmp_path / "one/samples/00005.png")).max() <= 1


@pytest.mark.slow
def test_repeated_with_every_option_set_nothing_is_sampled(concept, tmp_path, capfd, monkeypatch):
    """Whatever an option's value is recorded as, it is known again; so are files by other paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.safetensors").write_bytes(concept.read_bytes())
    (tmp_path / "prompts.txt").write_text("a V* cat in the snow\n")
    Image.new("RGB", (64, 64), "red").save("init.png")
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save("mask.png")
    options = (
        *("--from-file", "prompts.txt", "--negative-prompt", "a car", "--n-samples", 1, "--n-iter", 2, "--batch-size", 3),
        *("--seeds", "3", "--H", 64, "--W", 64, "--outdir", "o", "--solver", "ddim", "--steps", 3, "--scale", 5),
        *("--eta", 0.5, "--spacing", "trailing", "--strength", 0.9, "--checkpoint", ROOT / "data/tiny", "--clip-skip", 1),
        *("--device", "cpu", "--precision", "fp32", "--channels-last", "--vae-tile", 64, "--vae-batch", 1),
        *("--agg-time", 1, "--agg-lambda", -0.5, "--gain", 1e-05, "--token-sharpness", 2, "--pixel-sharpness", 3),
        *("--dci-layers", "input,output", "--auxiliary-weights", "base", "--separate-guidance", "--shared-noise"),
        *("--auxiliary-noun", "dog", "--save-maps", "--save-steps"),
    )
    files = ("--concept", "c.safetensors", "--model", ROOT / "configs/model/tiny.yaml", "--init-image", "init.png")
    run_main("sample_dci.py", *files, "--mask", "mask.png", *options)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "o").rglob("*.png")}
    assert len([file for file in before if file.parent.name == "samples"]) == 2
    (tmp_path / "there").mkdir()
    (tmp_path / "init.png").rename(tmp_path / "there/moved.png")
    again = ("--concept", tmp_path / "c.safetensors", "--model", ROOT / "configs/model/tiny.yaml")
    again = (*again, "--init-image", "there/moved.png", "--mask", "./mask.png")
    capfd.readouterr()
    run_main("sample_dci.py", *again, *options)
    assert "Batches: 0 sampled" in capfd.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "o").rglob("*.png")}
    other = run_here(capfd, "sample_dci.py", *again, *options, "--dci-layers", "input,middle")
    assert '\'dci.layers[1]\' of 00000 is "output" there and "middle" here' in other.stderr


@pytest.mark.slow
def test_another_file_under_the_same_name_is_noticed(concept, tmp_path, capfd):
    copy = tmp_path / "concept.safetensors"
    copy.write_bytes(concept.read_bytes())
    (tmp_path / "prompts.txt").write_text("a V* cat")
    common = (
        "--concept",
        copy,
        "--from-file",
        tmp_path / "prompts.txt",
        "--steps",
        1,
        "--n-samples",
        1,
        "--outdir",
        tmp_path / "o",
    )
    run_main("sample_dci.py", *common)
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main("sample_dci.py", *common)
    assert stop.value.code == 2
    assert "'concept_hash' of 00000 is" in capfd.readouterr().err


def test_mistakes_are_one_line_each(concept, tmp_path, capfd):
    (tmp_path / "latin.txt").write_bytes("a V* caf\u00e9".encode("latin-1"))
    (tmp_path / "other.txt").write_text("a {} in the snow\na dog\n")
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\r\n \r\n")
    good = ("--prompt", "a V* cat")
    for args, words in (
        (["--from-file", tmp_path / "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--from-file", tmp_path / "empty.txt"], ["empty.txt", "no prompts"]),
        (["--from-file", tmp_path / "other.txt"], ["'a dog' does not name the concept"]),
        (["--from-file", tmp_path], [tmp_path]),
        ([*good, "--shard", "0/3"], ["0/3", "K from 1 to N"]),
        ([*good, "--shard", "4/3"], ["4/3", "K from 1 to N"]),
        ([*good, "--shard", "half"], ["half", "3/8"]),
        ([*good, "--seeds", "0,-1"], ["0,-1", "from 0 on"]),
        ([*good, "--seeds", "5-3"], ["5-3", "lower end"]),
        ([*good, "--seeds", "1,1"], ["1,1", "different"]),
        ([*good, "--seeds", "1", "--seed", 2], ["--seed", "not allowed with"]),
    ):
        refused(run_here(capfd, "sample_dci.py", "--concept", concept, "--outdir", tmp_path / "o", *args), *words)
    refused(run_here(capfd, "sample_dci.py", "--concept", concept, *good, "--shard", "1/3"), "--shard needs --outdir")
    assert not (tmp_path / "o").exists()
