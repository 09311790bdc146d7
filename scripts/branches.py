"""What sample_dci.py has beside other sampling programs: DCI's options, and sheets that show the branches."""

import argparse
from pathlib import Path

from common import Parser, UserError, number

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
        "--auxiliary-weights", choices=["finetuned", "base"], help="keys and values of the auxiliary branch"
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
        help=f"for {AUTO}: who judges, such as open_clip:ViT-B-32/openai (default: for the embedded model the one on board)",
    )

    group = parser.add_argument_group("seeing it")
    group.add_argument("--save-maps", action="store_true", help="branch weights and attention maps, as sheets and .npz")
    group.add_argument("--save-steps", action="store_true", help="both branches' predicted pictures over the steps")


def settings_of(args: argparse.Namespace) -> dict:
    """Return DCI's settings that were given, under their names in DualBranch."""
    given = {name: getattr(args, name) for name in SETTINGS} | {"layers": args.dci_layers}
    return given | {"shared_guidance": False if args.separate_guidance else None, "shared_noise": args.shared_noise or None}


def check_steps(args: argparse.Namespace, dual, timesteps: list[int]) -> None:
    """Say so where no step has both branches although they were asked for.

    Raises:
        UserError: maps of both branches were asked for, or of a compiled UNet.
    """
    if args.save_maps and args.compile:
        raise UserError("--save-maps cannot look into a compiled UNet: leave --compile out")
    if dual and any(dual.is_dual(t) for t in timesteps):
        return
    if args.save_maps:
        raise UserError("--save-maps needs steps with both branches: raise --agg-time, and leave --no-dci out")
    if dual and dual.agg_time > 0:
        first = max(timesteps, default=0)
        print(f"note: the first timestep is {first}, and both branches run above {1000 - 1000 * dual.agg_time:g}: "
              "this is plain sampling; raise --agg-time")  # fmt: skip


def choose_noun(args: argparse.Namespace, base, concept, prompts: list[str]) -> str | None:
    """Return the auxiliary noun; for `auto` print how the candidates did.

    Args:
        base: the base model, without the concept.

    Raises:
        UserError: no encoder was named for a model that is not the embedded one.
    """
    if args.auxiliary_noun != AUTO:
        return args.auxiliary_noun
    from dci.encoders import TINY, load_encoder
    from dci.nouns import default_candidates, describe, score_nouns
    from dci.settings import sampling_options

    if not args.clip and base.config.name != "tiny":
        raise UserError(f"--auxiliary-noun {AUTO} needs a CLIP that knows what '{base.config.name}' draws: name one, "
                        "such as --clip open_clip:ViT-B-32/openai")  # fmt: skip
    clip = load_encoder(args.clip or TINY, device=str(base.device))
    given = [noun.strip() for noun in (args.auxiliary_candidates or "").split(",") if noun.strip()]
    options = sampling_options(base, steps=args.steps, scale=args.scale, seed=args.seed)
    scores = score_nouns(base, concept, prompts, given or default_candidates(concept.class_noun), clip, options)
    print(describe(scores))
    return scores[0].noun


class Seeing:
    """Sheets of pictures, drawn as these are sampled and written when they have names."""

    def __init__(self, args: argparse.Namespace, model):
        self.args, self.model = args, model
        self.waiting: list[dict] = []  # of each picture: (folder, ending) -> content

    def sample(self, sample, prompts: list, progress):
        """Call `sample(callback, maps)` for a batch, whose rows have these prompts, and draw their sheets."""
        from dci.maps import MapRecord
        from dci.steps import StepRecord

        steps, maps = StepRecord(), MapRecord()

        def callback(step: dict) -> None:
            steps.record(step)
            progress(step)

        pixels = sample(callback, maps.record if self.args.save_maps else None)
        self.waiting = [self._sheets(row, pixels[row], prompt, steps, maps) for row, prompt in enumerate(prompts)]
        return pixels

    def is_there(self, outdir: Path, name: str) -> bool:
        """Whether the sheets of a picture are written."""
        maps, steps = outdir / "maps" / f"{name}.npz", outdir / "steps" / f"{name}.png"
        return (maps.is_file() or not self.args.save_maps) and (steps.is_file() or not self.args.save_steps)

    def save(self, outdir: Path, names: list[str]) -> None:
        """Write the sheets of the pictures of the last batch, which have these names."""
        import numpy as np

        for name, files in zip(names, self.waiting, strict=True):
            for (folder, ending), content in files.items():
                (outdir / folder).mkdir(parents=True, exist_ok=True)
                file = outdir / folder / (name + ending)
                np.savez_compressed(file, **content) if ending == ".npz" else content.save(file)
        self.waiting = []

    def _sheets(self, row: int, pixels, prompt, steps, maps) -> dict:
        from dci.sheets import map_sheet, step_sheet
        from dci.steps import some_steps
        from ldm.images import to_pictures

        files = {}
        if self.args.save_steps:
            shown = steps.pictures(self.model, row, some_steps(len(steps.timesteps), steps.dual_steps))
            files["steps", ".png"] = step_sheet(shown, prompt.concept, prompt.auxiliary)
        if self.args.save_maps:
            arrays = maps.arrays(row)
            # The auxiliary branch has no finished picture: its last prediction stands for one.
            (other,) = steps.pictures(self.model, row, [steps.dual_steps - 1]).auxiliary
            (own,) = to_pictures(pixels[None])
            files["maps", ".npz"] = arrays
            for kind, picture, text in (
                ("weight", own, prompt.concept), ("concept", own, prompt.concept), ("auxiliary", other, prompt.auxiliary)
            ):  # fmt: skip
                files["maps", f"-{kind}.png"] = map_sheet(kind, arrays, picture, text)
        return files
