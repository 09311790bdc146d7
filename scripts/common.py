"""What all programs share: options, errors, the device, and where pictures go."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/model/tiny.yaml"
sys.path.insert(0, str(ROOT))  # the programs of a clone run the packages of that clone, whatever is installed

from ldm.errors import UserError  # noqa: E402


class Parser(argparse.ArgumentParser):
    """argparse that takes --agg_time for --agg-time and says what is wrong in one line."""

    def __init__(self, **options):
        super().__init__(**options)
        # argparse takes -2 for a value but -1e6 for an unknown option.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        args = sys.argv[1:] if args is None else args
        # Intermixed: key=value overrides may stand before, between and behind the options.
        return super().parse_intermixed_args([_hyphenate(arg) for arg in args], namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


def _hyphenate(arg: str) -> str:
    """Return an option with the underscores of its name as hyphens; values stay as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[], None]) -> None:
    """Call a program's main; a user's mistake, or a file that cannot be used, becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: cannot read or write {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def pick_device(name: str) -> str:
    """Return the torch device that `--device` asks for; auto is CUDA where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: give cpu, or cuda on a machine with a GPU") from error
    return name


def add_sampling_options(parser: Parser) -> None:
    """Add the options that every sampling program has."""
    parser.add_argument("--n-samples", type=positive, default=4, help="pictures to make (default 4)")
    parser.add_argument("--batch-size", type=positive, default=8, help="pictures made at a time (default 8)")
    parser.add_argument("--steps", "--ddim-steps", type=positive, help="solver steps (default: the model's)")
    parser.add_argument("--scale", type=number, help="classifier-free guidance (default: the model's)")
    parser.add_argument("--eta", "--ddim-eta", type=number, help="0 deterministic DDIM, 1 ancestral (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    parser.add_argument("--H", type=positive, metavar="PIXELS", help="height (default: the model's)")
    parser.add_argument("--W", type=positive, metavar="PIXELS", help="width (default: the model's)")
    parser.add_argument("--model", help="model configuration (default: the concept's own; without one, the embedded model)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the configuration's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--outdir", help="folder for the pictures (default: a new one in outputs/)")


def number(text: str) -> float:
    """Parse a finite number, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return value


def base_model(args: argparse.Namespace, trained: dict | None = None) -> tuple[str, str | None]:
    """Return the model configuration and the checkpoint that sampling should load.

    Args:
        trained: a concept's training configuration, whose model is taken where none is asked for.
    """
    if args.model:
        return args.model, args.checkpoint
    if trained and Path(trained["model"]).is_file():
        return trained["model"], args.checkpoint or trained["checkpoint"]
    return str(TINY), args.checkpoint


def sampling_arguments(args: argparse.Namespace) -> dict:
    """Return the sampling options that were given, under their names in SamplingOptions."""
    return {"steps": args.steps, "scale": args.scale, "eta": args.eta, "seed": args.seed, "height": args.H, "width": args.W}


def draw(args: argparse.Namespace, steps: int, sample: Callable) -> list:
    """Draw `--n-samples` pictures, `--batch-size` at a time, under a progress bar.

    Args:
        sample: (picture indices, callback for each step) -> pixels (b, 3, h, w).
    """
    from tqdm import tqdm

    from ldm.images import to_pictures

    starts = range(0, args.n_samples, args.batch_size)
    pictures = []
    with tqdm(total=len(starts) * steps, desc="sampling", unit="step") as progress:
        for start in starts:
            indices = list(range(start, min(start + args.batch_size, args.n_samples)))
            pictures += to_pictures(sample(indices, lambda _: progress.update()))
    return pictures


def open_outdir(args: argparse.Namespace) -> Path:
    """Return the folder for the pictures; before drawing, so that nothing drawn is lost.

    Raises:
        UserError: pictures cannot be added there.
    """
    outdir = Path(args.outdir) if args.outdir else _new_outdir(args.prompt)
    if outdir.exists() and not outdir.is_dir():
        raise UserError(f"--outdir {outdir} is a file: give a folder")
    _read_record(outdir)
    return outdir


def _read_record(outdir: Path) -> dict:
    record = outdir / "prompts.json"
    try:
        return json.loads(record.read_text()) if record.is_file() else {}
    except ValueError as error:
        raise UserError(f"{record} is not readable as JSON: mend it, or give another --outdir") from error


def save_pictures(outdir: Path, pictures: list, facts: dict) -> None:
    """Write samples/NNNNN.png, a grid of them, and prompts.json; earlier pictures are kept.

    Args:
        facts: with the picture's index added, everything needed to make a picture again.
    """
    from ldm.images import grid

    samples = outdir / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(f.stem) for f in samples.glob("*.png") if f.stem.isdigit()), default=-1)
    record = _read_record(outdir)
    for index, picture in enumerate(pictures):
        stem = f"{first + index:05}"
        picture.save(samples / f"{stem}.png")
        record[stem] = facts | {"index": index}
    (outdir / "prompts.json").write_text(json.dumps(record, indent=2))
    sheet = outdir / (f"grid-{first:05}.png" if first else "grid.png")
    grid(pictures).save(sheet)
    print(f"Pictures: {samples}\nGrid: {sheet}")


def _new_outdir(prompt: str) -> Path:
    """Return a folder in outputs/ named after the time and the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return Path("outputs") / f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{words}"
