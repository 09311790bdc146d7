"""Kill a tiny run at random moments with SIGKILL, resume each, and compare the concept files bit by bit.

python tests/kill_and_resume.py --trials 10        (about five minutes on one core)
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    "training.steps=40",
    "training.checkpoint_every=4",
    "training.batch_size=4",
    "validation.every=15",
    "validation.steps=3",
    "resume=auto",
)


def command(logdir: Path) -> list[str]:
    """The same command begins a run and goes on with it."""
    script, config = ROOT / "scripts/train_ico.py", ROOT / "configs/train/ico-tiny.yaml"
    return [sys.executable, str(script), "--config", str(config), "--logdir", str(logdir), "--device", "cpu", *OPTIONS]


def finish(logdir: Path) -> bytes:
    """Run to the end and return the concept file's content."""
    subprocess.run(command(logdir), check=True, capture_output=True)
    (file,) = logdir.glob("*/concept.safetensors")
    return file.read_bytes()


def kill_after(logdir: Path, seconds: float) -> str:
    """Begin a run, kill it, and return what was there then."""
    process = subprocess.Popen(command(logdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    finished = process.poll() is not None
    process.kill()
    process.wait()
    checkpoints = sorted(f.name for f in logdir.glob("*/checkpoints/*.ckpt"))
    return "finished before" if finished else (checkpoints[-1] if checkpoints else "no checkpoint yet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        expected = finish(Path(folder) / "whole")
        duration = time.monotonic() - start
        print(f"uninterrupted: {duration:.1f} s, sha256 {hashlib.sha256(expected).hexdigest()[:16]}", flush=True)
        same = 0
        for trial in range(args.trials):
            logdir, moment = Path(folder) / str(trial), moments.uniform(0.05, 0.95) * duration
            found = kill_after(logdir, moment)
            equal = finish(logdir) == expected
            same += equal
            print(f"killed after {moment:5.1f} s ({found}): {'same' if equal else 'DIFFERENT'}", flush=True)
    print(f"{same} of {args.trials} resumed runs have bitwise the same concept file")
    sys.exit(same != args.trials)


if __name__ == "__main__":
    main()
