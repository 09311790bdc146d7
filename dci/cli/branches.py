"""What sample_dci.py has beside other sampling programs: DCI's options, and sheets that show the branches."""

import argparse
import warnings

from dci.cli.arguments import Parser, number
from ldm.errors import Note, UserError

SETTINGS = ("agg_time", "agg_lambda", "gain", "token_sharpness", "pixel_sharpness", "auxiliary_weights")
AUTO = "auto"


def add_dci_options(parser: Parser) -> None:
    """Add the options of DCI."""
    group = parser.add_argument_group("DCI (defaults: the model's)")
    group.add_argument("--agg-time", type=number, help="T_a: share of the timesteps with both branches, 0 to 1")
    group.add_argument("--agg-lambda", type=number, help="weight of the auxiliary branch, typically -2 to 2")
    group.add_argument("--gain", type=number, help="factor on the normalised evidence")
    group.add_argument("--token-sharpness", type=number, help="factor before the softmax over a prompt's tokens")
    group.add_argument("--pixel-sharpness", type=number, help="factor before the softmax over a layer's pixels")
    group.add_argument(
        "--dci-layers",
        metavar="NAMES",
        help="integrate there alone: input, middle, output, a resolution (16), layer3, input_blocks.1.1; with commas",
    )
    group.add_argument(
        "--auxiliary-weights",
        choices=["finetuned", "base"],
        help="keys and values of the auxiliary "
        "branch; what else a concept changes (a LoRA's other layers) is the concept's in both branches",
    )
    group.add_argument("--separate-guidance", action="store_true", help="guide the auxiliary branch by itself")
    group.add_argument("--shared-noise", action="store_true", help="start both branches from the same noise")
    group.add_argument("--no-dci", action="store_true", help="plain sampling of the fine-tuned model")

    group = parser.add_argument_group("auxiliary noun")
    group.add_argument("--auxiliary-noun", help=f"one that the base model knows well (default: the class noun), or {AUTO}")
    group.add_argument("--auxiliary-candidates", metavar="NOUNS", help=f"for {AUTO}, with commas (default: from the noun)")
    group.add_argument(
        "--clip",
        metavar="NAME",
        help=f"for {AUTO}: the scoring encoder, such as open_clip:ViT-B-32/openai (embedded model: its own)",
    )

    group = parser.add_argument_group("the branches, made visible")
    group.add_argument("--save-maps", action="store_true", help="branch weights and attention maps, as sheets and .npz")
    group.add_argument("--save-steps", action="store_true", help="both branches' predicted images over the steps")


def settings_of(args: argparse.Namespace) -> dict:
    """Return DCI's settings that were given, under their names in DualBranch."""
    given = {name: getattr(args, name) for name in SETTINGS} | {"layers": args.dci_layers}
    return given | {"shared_guidance": False if args.separate_guidance else None, "shared_noise": args.shared_noise or None}


def warn_of_no_effect(args: argparse.Namespace) -> None:
    """Give a note on options of DCI that were given, and change nothing."""
    names = (*SETTINGS, "dci_layers", "separate_guidance", "shared_noise", "auxiliary_noun")
    given = [name for name in names if (value := getattr(args, name)) is not None and value is not False]
    if args.no_dci and given:
        warnings.warn(f"{_listed(given)} no effect with --no-dci, which is plain sampling", Note, stacklevel=2)
    given = [name for name in ("auxiliary_candidates", "clip") if getattr(args, name) is not None]
    if args.auxiliary_noun != AUTO and given:
        warnings.warn(f"{_listed(given)} no effect without --auxiliary-noun {AUTO}", Note, stacklevel=2)


def _listed(names: list[str]) -> str:
    """Names of arguments as the subject of a sentence: "--gain and --clip have"."""
    options = [f"--{name.replace('_', '-')}" for name in names]
    return f"{' and '.join(options)} {'have' if len(options) > 1 else 'has'}"


def check_maps(args: argparse.Namespace, prepared) -> None:
    """Raise UserError where maps of both branches were asked for and there are none, or the UNet is compiled."""
    if args.save_maps and args.compile:
        raise UserError("--save-maps cannot look into a compiled UNet: leave --compile out")
    if args.save_maps and not prepared.dual_steps:
        raise UserError("--save-maps needs steps with both branches: raise --agg-time, and leave --no-dci out")


def describe_gain(prepared) -> str:
    """Return in one line which gain DCI has, and why."""
    layers, model = prepared.pipeline.model.unet.cross_layers(), prepared.pipeline.model
    _, height, width = model.latent_shape(prepared.options.height, prepared.options.width)
    finest = min(layer.factor for layer in layers)
    return (
        f"DCI: gain {prepared.dual.gain:g} for {height // finest * (width // finest)} pixels in the finest cross-attention"
    )


def choose_noun(args: argparse.Namespace, base, concept, prompts: list[str]) -> str | None:
    """Return the auxiliary noun; for `auto` print how the candidates did.

    Args:
        base: the base model, without the concept.

    Raises:
        UserError: no encoder was named for a model that is not the embedded one.
    """
    if args.auxiliary_noun != AUTO:
        return args.auxiliary_noun
    from dci.dual_branch.options import sampling_options
    from dci.evaluation import auxiliary_noun

    options = sampling_options(base, steps=args.steps, scale=args.scale, seed=args.seed)
    scores = auxiliary_noun.choose_noun(base, concept, prompts, options, args.clip, args.auxiliary_candidates)
    print(auxiliary_noun.describe(scores))
    return scores[0].noun
