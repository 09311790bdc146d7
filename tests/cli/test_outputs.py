"""Where programs put things and what they print: the same second, chosen seeds, odd characters, readers that leave."""

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from helpers import ENVIRONMENT, ROOT, mostly_slow, refused, run_here, run_main

from dci.cli import output
from dci.cli.arguments import as_options
from dci.finetuning import run_folder
from ldm.errors import reported_in_one_line


@pytest.mark.parametrize(
    ("module", "make"),
    [
        (run_folder, lambda: run_folder.make_run_folder(run_folder.Path("logs"), "ico")),
        (output, lambda: output._new_outdir("a dog")),
    ],
    ids=["training", "sampling"],
)
def test_runs_of_the_same_second_have_a_folder_each(tmp_path, monkeypatch, module, make):
    class Stopped(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "datetime", Stopped)
    with ThreadPoolExecutor(8) as pool:
        folders = [call.result() for call in [pool.submit(make) for _ in range(40)]]
    assert len(set(folders)) == 40 and all(folder.is_dir() for folder in folders)
    assert {folder.name.partition("_")[2].rpartition("-")[2] for folder in folders} >= {str(n) for n in range(2, 41)}


@pytest.mark.slow
def test_a_seed_is_chosen_and_recorded(tmp_path, capfd):
    chosen = []
    for name in ("a", "b"):
        run_main(
            "txt2img.py", "--prompt", "a dog", "--steps", 1, "--n-samples", 1, "--seed", -1, "--outdir", tmp_path / name
        )
        seed = json.loads((tmp_path / name / "prompts.json").read_text())["00000"]["seed"]
        assert f"Seed: {seed}\n" in capfd.readouterr().out
        chosen.append(seed)
    assert chosen[0] != chosen[1] and min(chosen) >= 0
    given = ("--prompt", "a dog", "--outdir", tmp_path / "c")
    refused(run_here(capfd, "txt2img.py", *given, "--seed", "-2"), "-2", "or -1")
    refused(run_here(capfd, "txt2img.py", *given, "--seed", "-1", "--shard", "1/2"), "give the seed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2**32, 2**64])
def test_training_takes_every_seed(tmp_path, seed):
    run_main(
        *("train_ico.py", "--config", ROOT / "configs/train/ico-tiny.yaml", "--logdir", tmp_path, "--device", "cpu"),
        *("training.steps=1", "training.batch_size=1", "validation.every=0", "logging.tensorboard=false"),
        f"training.seed={seed}",
    )
    assert f"seed: {seed}" in next(tmp_path.glob("*/configs/config.yaml")).read_text()


def python(code, encoding="utf-8", **options):
    program = f"from dci.cli.arguments import run\ndef main():\n{code}\nrun(main)"
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=100, **options)


@pytest.mark.parametrize("encoding", mostly_slow(["ascii", "latin-1", "utf-8"], "ascii"))
def test_every_character_can_be_printed(encoding):
    code = "  import sys\n  print('\\u2192 \\xe9 \\udcff')\n  print('\\u2192 \\udcff', file=sys.stderr)"
    done = python(code, encoding)
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr.count(b"\n")) == (0, 1, 1)
    assert b"\\udcff" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
@pytest.mark.parametrize("both", mostly_slow(["", "2>&1"], "2>&1"), ids=["stdout", "both"])
def test_a_reader_that_leaves_is_no_error_and_the_work_is_done(tmp_path, both):
    lines = "\n".join(
        [
            "from dci.cli.arguments import run",
            "import sys, time, pathlib",
            "def main():",
            "  for i in range(20000): print('line', i, flush=i % 100 == 0)",
            "  print('note', file=sys.stderr)",
            f"  pathlib.Path({str(tmp_path / 'done')!r}).touch()",
            "run(main)",
        ]
    )
    (tmp_path / "program.py").write_text(lines)
    command = f"{{ {sys.executable} {tmp_path / 'program.py'} {both}; echo $? > {tmp_path / 'code'}; }} | head -1"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "line 0\n"
    assert done.stderr == ("" if both else "note\n")
    assert (tmp_path / "done").exists() and (tmp_path / "code").read_text() == "0\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=["Python", "CPU", "GPU"],
)
def test_too_little_memory_is_one_line(capfd, error):
    with pytest.raises(SystemExit) as stop, reported_in_one_line(as_options):
        raise error
    line = capfd.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: not enough memory: make fewer images") and line.count("\n") == 1
    assert "(--batch-size, --H, --W; in training training.micro_batch=)" in line


def test_other_errors_are_the_programs_fault_and_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), reported_in_one_line():
        raise RuntimeError("shapes do not fit")


def test_the_programs_streams_are_given_back():
    before = sys.stdout, sys.stderr, warnings.formatwarning
    with pytest.raises(SystemExit), reported_in_one_line():
        raise OSError(28, "No space left on device", "file")
    assert (sys.stdout, sys.stderr) == before[:2]
    warnings.formatwarning = before[2]
