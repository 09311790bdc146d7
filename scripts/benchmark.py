"""Measure speed and memory, ours beside a peer's, in alternation in one process on the same weights.

python scripts/benchmark.py                                                  # DCI over plain sampling
python scripts/benchmark.py sample --model sd-v1 --peer diffusers --size 256 --precision bf16
"""

import importlib
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import PRECISIONS, Parser, number, positive, run
from dci.cli.loading import pick_device
from ldm.shipped import ROOT

WHAT = {
    "sample": "DCI over plain sampling, or the UNet's step and plain sampling beside a peer",
    "train": "a training step",
    "dbim": "the integration module",
    "load": "loading weights, in processes of their own",
}


def arguments():
    """Parse what to measure, against which peer, and at which size and precision."""
    parser = Parser(description=__doc__.splitlines()[0])
    kinds = "; ".join(f"{name}: {text}" for name, text in WHAT.items())
    parser.add_argument("what", nargs="?", choices=list(WHAT), default="sample", help=f"{kinds} (default sample)")
    parser.add_argument("--model", choices=("tiny", "sd-v1"), default="tiny", help="sd-v1 has random weights (default tiny)")
    parser.add_argument("--peer", choices=("none", "diffusers", "pipeline", "naive"), default="none", help="(default none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="of both (default fp32)")
    parser.add_argument("--compile", action="store_true", help="compile the UNets, the peer's too where it samples")
    parser.add_argument("--batch", type=positive, default=1, help="images at a time (default 1)")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="side of the images (default: the model's)")
    parser.add_argument("--steps", type=positive, default=50, help="solver steps (default 50)")
    parser.add_argument("--agg-time", type=number, default=0.3, help="T_a (default 0.3)")
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds, after one to warm up (default 5)")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results"), help="folder (default benchmarks/results)")
    return parser.parse_args()


def main() -> None:
    """Run one measurement, and print and save its page of results."""
    args = arguments()
    args.device = pick_device("cpu" if (args.what, args.device) == ("load", "auto") else args.device)
    given = {key: value for key, value in vars(args).items() if key != "out"}
    args.dtype = PRECISIONS[args.precision]

    from benchmarks import report

    results = importlib.import_module(f"benchmarks.{args.what}").measure(args)
    page = report.write(Path(args.out), given, results)
    print(f"{page.read_text()}\nWritten to {page} and {page.with_suffix('.json').name}")


if __name__ == "__main__":
    run(main)
