"""What all programs share: options, errors, the device, and where pictures go."""

import argparse
import functools
import math
import re
import sys
import warnings
from collections.abc import Callable
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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
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
    parser.add_argument("--prompt", help="what to draw")
    parser.add_argument("--from-file", metavar="FILE", help="a UTF-8 text file with a prompt in each line, not --prompt")
    parser.add_argument("--negative-prompt", default="", help="what to lead away from")
    parser.add_argument("--n-samples", type=positive, default=4, help="pictures of each prompt and seed (default 4)")
    parser.add_argument("--n-iter", type=positive, default=1, help="so many times --n-samples (default 1)")
    parser.add_argument("--batch-size", type=positive, default=8, help="pictures made at a time (default 8)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    seeds.add_argument("--seeds", type=whole_numbers, metavar="A,B-C", help="several seeds, such as 0,1,2 or 0-7")
    parser.add_argument("--H", type=positive, metavar="PIXELS", help="height (default: the model's)")
    parser.add_argument("--W", type=positive, metavar="PIXELS", help="width (default: the model's)")
    parser.add_argument("--outdir", help="folder for the pictures, and to go on in (default: a new one in outputs/)")
    parser.add_argument("--shard", type=share, default=(1, 1), metavar="K/N", help="make share K of N, from 1/N to N/N")

    group = parser.add_argument_group("solver")
    group.add_argument("--solver", help="ddim, plms, dpm++2m, dpm++2m-karras, euler, euler-a (default: the model's)")
    group.add_argument("--steps", "--ddim-steps", type=positive, help="solver steps (default: the model's)")
    group.add_argument("--scale", type=number, help="classifier-free guidance (default: the model's)")
    group.add_argument("--eta", "--ddim-eta", type=number, help="DDIM: 0 deterministic, 1 ancestral (default: the model's)")
    group.add_argument("--spacing", choices=["leading", "trailing"], help="of the timesteps (default: the model's)")
    group.add_argument(
        "--zero-terminal-snr", action="store_true", default=None, help="rescale the schedule to end in pure noise"
    )

    group = parser.add_argument_group("starting from a picture")
    group.add_argument("--init-image", metavar="FILE", help="the picture to start from")
    group.add_argument("--strength", type=number, help="0 keeps the picture, 1 takes all steps (default 0.75, masked 1)")
    group.add_argument("--mask", metavar="FILE", help="white where to paint, black where to keep; of the picture's size")

    group = parser.add_argument_group("model and machine")
    add_model_options(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    precisions = ["auto", *PRECISIONS]
    group.add_argument("--precision", choices=precisions, default="auto", help="default: the device's fastest, and said")
    group.add_argument("--compile", action="store_true", help="compile the UNet: minutes at first, faster afterwards")
    group.add_argument("--channels-last", action="store_true", help="memory layout (GPUs get it in half precision anyway)")
    group.add_argument("--vae-tile", type=positive, metavar="PIXELS", help="side of tiles in decoding (default: if needed)")
    group.add_argument("--vae-batch", type=positive, metavar="N", help="pictures decoded at a time (default: what fits)")


def add_model_options(parser) -> None:
    """Add the options that say which base model to load."""
    parser.add_argument(
        "--model",
        "--config",
        help="YAML, .ckpt or .safetensors file, diffusers folder, hub id (default: the concept's, or the embedded model)",
    )
    parser.add_argument("--checkpoint", "--ckpt", help="weights of any format, in place of the configuration's own")
    parser.add_argument("--ema", action="store_true", help="use the checkpoint's averaged weights (model_ema.*)")
    parser.add_argument("--clip-skip", type=positive, metavar="N", help="text encoder: 1 all layers, 2 all but one, ...")


PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of precisions, and of torch's types."""


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


def whole_numbers(text: str) -> list[int]:
    """Parse "0,2,5-7" -> [0, 2, 5, 6, 7], for argparse."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers from 0 on, such as 0,1,2 or 0-7")
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    numbers = [number for span in spans for number in range(span[0], span[-1] + 1)]
    if not numbers or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected different numbers, the lower end of a span first")
    return numbers


def share(text: str) -> tuple[int, int]:
    """Parse "3/8" -> (3, 8), for argparse."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected K/N with K from 1 to N, such as 3/8")
    return int(match[1]), int(match[2])


def base_model(args: argparse.Namespace, trained: dict | None = None) -> tuple[str, str | None]:
    """Return the model and the checkpoint that sampling should load: arguments of `load_model`.

    Args:
        trained: a concept's training configuration, whose model is taken where none is asked for.
    """
    from ldm.formats.hub import is_hub_id

    if args.model:
        return args.model, args.checkpoint
    own = (trained or {}).get("model")
    if isinstance(own, str) and (Path(own).exists() or is_hub_id(own)):
        return own, args.checkpoint or trained.get("checkpoint")
    # Weights alone tell their architecture.
    return (args.checkpoint, None) if args.checkpoint else (str(TINY), None)


def load_base(args: argparse.Namespace, base: str, checkpoint: str | None):
    """Load the base model, in the precision and layout that suit `--device` or are asked for, still on the CPU.

    `--precision auto` is said, and replaced in `args` by what it came to.
    """
    import torch

    from ldm.acceleration import accelerate, fastest_precision
    from ldm.checkpoint import load_model

    device = pick_device(args.device)
    if args.precision == "auto":
        dtype = functools.partial(fastest_precision, device=device)
    else:
        dtype = getattr(torch, PRECISIONS[args.precision])
    model = load_model(base, checkpoint, dtype=dtype, ema=args.ema, clip_skip=args.clip_skip)
    if args.precision == "auto":
        args.precision = next(name for name, dtype in PRECISIONS.items() if getattr(torch, dtype) == model.dtype)
        print(f"Precision: {args.precision}, the fastest for this model on {device}")
    done = accelerate(model, device, args.channels_last, args.compile)
    if done:
        print(f"For speed: {', '.join(done)}")
    return model


def add_rank_options(parser: Parser) -> None:
    """Add the options of a low-rank concept file."""
    parser.add_argument("--rank", type=positive, help="store the change of each weight as a product of this rank")
    parser.add_argument("--energy", type=number, help="or of as small a rank as keeps this share of its squares, 0 to 1")
    parser.add_argument("--max-mb", type=number, default=10.0, help="that the file may take (default 10)")


def check_rank_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that no concept could be compressed with; before training, not behind it."""
    if args.rank is not None and args.energy is not None:
        raise UserError("--rank and --energy exclude each other: give one of them")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise UserError(f"--energy {args.energy}: expected a share above 0, at most 1")


def compress_file(args: argparse.Namespace, source: Path, target: Path, model) -> None:
    """Write a concept file whose weights are low-rank changes, and say what that costs.

    Args:
        model: the base model, without the concept.
    """
    from dci.concept import Concept
    from dci.lowrank import compress

    compression = compress(Concept.load(source), model, args.rank, args.energy, args.max_mb)
    compression.concept.save(target)
    print(f"{target}: {compression.describe()}; the file has {target.stat().st_size / 1e6:.2f} MB")


def sampling_arguments(args: argparse.Namespace) -> dict:
    """Return the sampling options that were given, under their names in SamplingOptions."""
    same = ("steps", "scale", "eta", "solver", "spacing", "zero_terminal_snr", "vae_tile", "vae_batch")
    given = {name: getattr(args, name) for name in same}
    return {"height": args.H, "width": args.W, "seed": args.seeds[0] if args.seeds else args.seed, **given}


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return the prompts of --prompt or --from-file.

    Raises:
        UserError: neither or both were given, or the file holds none.
    """
    if (args.prompt is None) == (args.from_file is None):
        raise UserError("give either --prompt TEXT or --from-file FILE, and not both")
    if args.prompt is not None:
        return [args.prompt]
    try:
        # Not splitlines: a prompt may hold characters that it would split at, such as U+2028.
        lines = Path(args.from_file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--from-file {args.from_file} is not UTF-8 text: expected a prompt in each line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file {args.from_file} holds no prompts: expected one in each line")
    return prompts


def canvas_and_options(args: argparse.Namespace, model):
    """Return the picture to start from, if any, and the sampling options, whose size follows it.

    Raises:
        UserError: an option is out of range, or the picture cannot be used.
    """
    from dci.settings import sampling_options
    from ldm.canvas import Canvas, fitting_size
    from ldm.images import read_picture

    given = sampling_arguments(args)
    if not args.init_image:
        for name in ("mask", "strength"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} needs a picture to start from: give it with --init-image FILE")
        return None, sampling_options(model, **given)
    picture = read_picture(args.init_image)
    mask = read_picture(args.mask) if args.mask else None
    height, width = fitting_size(model, picture)
    options = sampling_options(model, **{**given, "height": args.H or height, "width": args.W or width})
    strength = args.strength if args.strength is not None else 1.0 if mask else 0.75
    return Canvas.of(model, picture, options.height, options.width, strength, mask), options
