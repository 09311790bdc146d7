"""What all programs share: options, errors, the device, and where images go."""

import argparse
import math
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn, TypeVar, overload

from dci.files import read_prompts
from dci.samples.image_metadata import PRECISIONS
from ldm.errors import UserError, reported_in_one_line
from ldm.shipped import find

_MAY_BE_EMPTY = ("prompt", "negative_prompt")

_VERB: ContextVar[str | None] = ContextVar("verb", default=None)
"""The verb of `dci` that is running, the first word of its command line; None: a script."""

_Into = TypeVar("_Into")
_Number = TypeVar("_Number", int, float)


class Parser(argparse.ArgumentParser):
    """argparse that takes --agg_time for --agg-time and reports what is wrong in one line."""

    def __init__(self, **options):
        # Not argparse's own idea of it, which differs between `python -m dci` and `dci`.
        described = re.sub(r"python scripts/\w+\.py", "%(prog)s", options.pop("description", ""))
        program = f"dci {_VERB.get()}" if _VERB.get() else Path(sys.argv[0]).name
        super().__init__(**{"prog": program, "description": described, **options})
        # argparse takes -2 for a value but -1e6 for an unknown option.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    @overload
    def parse_args(self, args: Iterable[str] | None = None, namespace: None = None) -> argparse.Namespace: ...
    @overload
    def parse_args(self, args: Iterable[str] | None, namespace: _Into) -> _Into: ...
    @overload
    def parse_args(self, *, namespace: _Into) -> _Into: ...
    def parse_args(self, args: Iterable[str] | None = None, namespace: object = None) -> object:
        """Parse options and overrides in any order; an empty value of an option that needs one ends the program."""
        args = sys.argv[2 if _VERB.get() else 1 :] if args is None else args
        # Intermixed: key=value overrides may stand before, between and behind the options.
        found = super().parse_intermixed_args([_hyphenate(arg) for arg in args], namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            empty = value == "" or (isinstance(value, list) and "" in value)
            if empty and action.option_strings and action.dest not in _MAY_BE_EMPTY:
                self.error(f"argument {action.option_strings[0]}: it is empty: give a value, or leave it out")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _hyphenate(arg: str) -> str:
    """Return an option with the underscores of its name as hyphens; values stay as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[], None], verb: str | None = None) -> None:
    """Call a program's main; a user's mistake, an unusable file or a missing extra becomes one line and exit code 2.

    Args:
        verb: of `dci`, where the command line begins with one. sys.argv keeps it: Lightning starts the other processes of
            a training by sys.argv.
    """
    _VERB.set(verb)
    with reported_in_one_line(as_options):
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda message, *rest, **more: as_options(format_warning(message, *rest, **more))
        main()


_BRANCHES = ("agg_time", "agg_lambda", "gain", "token_sharpness", "pixel_sharpness", "auxiliary_weights", "auxiliary_noun")
_SOLVER = ("steps", "scale", "eta", "solver", "spacing", "seed", "zero_terminal_snr", "vae_tile", "vae_batch", "shard")
_IMAGES = ("init_image", "mask", "strength", "batch_size", "original_size", "crop")
_MODEL = ("model", "checkpoint", "vae", "ema", "clip")
_CONCEPT = ("concept", "class_noun", "trigger", "strength_concept", "rank", "energy", "bundle")
_OPTIONS = {
    "height": "H",
    "width": "W",
    "layers": "dci-layers",
    "negative": "negative-prompt",
    "n": "n-samples",
    **{name: name.replace("_", "-") for name in (*_BRANCHES, *_SOLVER, *_IMAGES, *_MODEL, *_CONCEPT)},
    "loras": "lora",
    "which": "weights",
    "words": "name",
    "as_folder": "folder",
    "logdir": "logdir",
    "references": "references",
    "most_megabytes": "max-mb",
}
"""Options of the programs, by their names in Python."""


def as_options(message: str) -> str:
    """Return a library's message with the programs' names of options in place of Python's.

    The library writes `name value: ...` at the beginning, and `name=` where it asks for one.
    """
    names = "|".join(sorted(_OPTIONS, key=len, reverse=True))
    message = re.sub(
        rf"^((?:note: |warning: )?)({names})(?= \S+: |: | '[^']*': )", lambda m: f"{m[1]}--{_OPTIONS[m[2]]}", message
    )
    return re.sub(rf"(?<![\w.-])({names})=(?=[\s,;:)]|$)", lambda m: f"--{_OPTIONS[m[1]]}", message)


def add_sampling_options(parser: Parser) -> None:
    """Add the options that every sampling program has."""
    parser.add_argument("--prompt", help="what to generate")
    parser.add_argument("--from-file", metavar="FILE", help="a UTF-8 text file with a prompt in each line, not --prompt")
    parser.add_argument("--negative-prompt", default="", help="what to lead away from")
    parser.add_argument("--n-samples", type=positive, default=4, help="images of each prompt and seed (default 4)")
    parser.add_argument("--n-iter", type=positive, default=1, help="so many times --n-samples (default 1)")
    parser.add_argument("--batch-size", type=positive, default=8, help="images made at a time (default 8)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=seed, default=0, help="same seed, same images (default 0); -1 chooses one and prints it"
    )
    seeds.add_argument("--seeds", type=whole_numbers, metavar="A,B-C", help="several seeds, such as 0,1,2 or 0-7")
    parser.add_argument("--H", type=positive, metavar="PIXELS", help="height (default: the model's)")
    parser.add_argument("--W", type=positive, metavar="PIXELS", help="width (default: the model's)")
    parser.add_argument(
        "--original-size",
        nargs="+",
        metavar="PIXELS",
        help="SDXL: height and width of the image as it were before it was resized (default: that of the image)",
    )
    parser.add_argument("--crop", nargs="+", metavar="PIXELS", help="SDXL: top and left of what were cut off (default: 0 0)")
    parser.add_argument("--outdir", help="folder for the images, and to go on in (default: a new one in outputs/)")
    parser.add_argument("--shard", type=share, default=(1, 1), metavar="K/N", help="make share K of N, from 1/N to N/N")

    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:0.8]",
        help="put a LoRA (a style) on the base model, with a strength; may be repeated",
    )

    group = parser.add_argument_group("solver")
    group.add_argument("--solver", help="ddim, plms, dpm++2m, dpm++2m-karras, euler, euler-a (default: the model's)")
    group.add_argument("--steps", "--ddim-steps", type=positive, help="solver steps (default: the model's)")
    group.add_argument("--scale", type=number, help="classifier-free guidance (default: the model's)")
    group.add_argument("--eta", "--ddim-eta", type=number, help="DDIM: 0 deterministic, 1 ancestral (default: the model's)")
    spacings = ["leading", "trailing", "linspace"]
    group.add_argument("--spacing", choices=spacings, help="of the timesteps (default: the model's, or the solver's)")
    group.add_argument(
        "--zero-terminal-snr", action="store_true", default=None, help="rescale the schedule to end in pure noise"
    )

    group = parser.add_argument_group("starting from an image")
    group.add_argument("--init-image", metavar="FILE", help="the image to start from")
    group.add_argument("--strength", type=number, help="0 keeps the image, 1 takes all steps (default 0.75, masked 1)")
    group.add_argument("--mask", metavar="FILE", help="white where to paint, black where to keep; of the image's size")

    group = parser.add_argument_group("model and machine")
    add_model_options(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    precisions = ["auto", *PRECISIONS]
    group.add_argument(
        "--precision", choices=precisions, default="auto", help="default: the device's fastest; it is printed"
    )
    group.add_argument("--compile", action="store_true", help="compile the UNet: minutes at first, faster afterwards")
    group.add_argument("--channels-last", action="store_true", help="memory layout (GPUs get it in half precision anyway)")
    group.add_argument("--vae-tile", type=positive, metavar="PIXELS", help="side of tiles in decoding (default: if needed)")
    group.add_argument("--vae-batch", type=positive, metavar="N", help="images decoded at a time (default: what fits)")


def add_model_options(parser) -> None:
    """Add the options that say which base model to load."""
    parser.add_argument(
        "--model",
        "--config",
        help="YAML, .ckpt or .safetensors file, diffusers folder, hub id (default: the concept's, or the embedded model)",
    )
    parser.add_argument("--checkpoint", "--ckpt", help="weights of any format, in place of the configuration's own")
    parser.add_argument("--vae", metavar="FILE", help="an autoencoder's file or folder, in place of the checkpoint's own")
    parser.add_argument("--ema", action="store_true", help="use the checkpoint's averaged weights (model_ema.*)")
    parser.add_argument("--clip-skip", type=positive, metavar="N", help="text encoder: 1 all layers, 2 all but one, ...")


def number(text: str) -> float:
    """Parse a finite number, for argparse."""
    value = _read(float, text)
    if value is None or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def _read(kind: Callable[[str], _Number], text: str) -> _Number | None:
    """The number that a text is; None: it is none. argparse's own message would name the function that reads it."""
    try:
        return kind(text)
    except ValueError:
        return None


def above_zero(text: str) -> float:
    """Parse a finite number above 0, for argparse."""
    value = _read(float, text)
    if value is None or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    value = _read(int, text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return value


def port(text: str) -> int:
    """Parse a port, for argparse."""
    value = _read(int, text)
    if value is None or not 1 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: expected a port, 1 to 65535")
    return value


class ChosenSeed(int):
    """A seed that the program has chosen itself."""


def seed(text: str) -> int:
    """Parse a seed, a whole number from 0 on, for argparse; -1 chooses one."""
    value = _read(int, text)
    if value is None or value < -1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 on, or -1 for any")
    return ChosenSeed(secrets.randbelow(2**32)) if value == -1 else value


_MOST = 10**6  # numbers in a list of them


def whole_numbers(text: str) -> list[int]:
    """Parse "0,2,5-7" -> [0, 2, 5, 6, 7], for argparse."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers from 0 on, such as 0,1,2 or 0-7")
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if sum(max(span[-1] - span[0], 0) + 1 for span in spans) > _MOST:
        raise argparse.ArgumentTypeError(f"{text}: expected at most {_MOST:,} numbers")
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


def image_file(text: str) -> str:
    """Parse the name of an image's file to write, for argparse."""
    from PIL import Image

    Image.init()
    if Path(text).is_dir() or Image.EXTENSION.get(Path(text).suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{text}: expected a file's name that ends in .png, .jpg, .webp or the like")
    return text


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


def sampling_arguments(args: argparse.Namespace) -> dict:
    """Return the sampling options that were given, under their names in SamplingOptions."""
    same = ("steps", "scale", "eta", "solver", "spacing", "zero_terminal_snr", "vae_tile", "vae_batch")
    given = {name: getattr(args, name) for name in same}
    given |= {name: _two_numbers(name, getattr(args, name)) for name in ("original_size", "crop")}
    return {"height": args.H, "width": args.W, "seed": args.seeds[0] if args.seeds else args.seed, **given}


def _two_numbers(name: str, words: list[str] | None) -> tuple[int, int] | None:
    """Parse ["1024", "768"], ["1024x768"] or ["1024,768"] -> (1024, 768).

    Raises:
        UserError: something else.
    """
    if words is None:
        return None
    match = re.fullmatch(r"(\d+)[x, ]\s*(\d+)", " ".join(words).strip())
    if not match:
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{option} {' '.join(words)}: expected two whole numbers from 0 on, such as {option} 1024 768")
    return int(match[1]), int(match[2])


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return the prompts of --prompt or --from-file.

    Raises:
        UserError: neither or both were given, or the file holds none.
    """
    if (args.prompt is None) == (args.from_file is None):
        raise UserError("give either --prompt TEXT or --from-file FILE, and not both")
    if args.prompt is not None:
        return [args.prompt]
    return read_prompts(find(args.from_file), f"--from-file {args.from_file}")
