"""Learn a concept from a folder of images: ICO, Custom Diffusion, textual inversion.

python scripts/train_ico.py --config configs/train/ico-tiny.yaml data.images=FOLDER concept.class_noun=dog
python scripts/train_ico.py --resume logs/RUN
"""

import json
import sys
from pathlib import Path

from dci.cli.arguments import Parser, add_rank_options, check_rank_options
from dci.cli.loading import compress_file, pick_device


def main() -> None:
    """Train from a configuration, or resume a run, and print where the concept file is."""
    parser = _parser()
    args = parser.parse_args()
    if not args.config and args.resume in (None, "auto"):
        parser.error("give --config FILE, or --resume RUN to go on with a run")
    check_rank_options(args)

    from dci.concept.loras import load_with_loras
    from dci.finetuning.callbacks import print_how_to_sample
    from dci.finetuning.config import concepts_of
    from dci.finetuning.config_files import finetune_config
    from dci.finetuning.distributed import own_device, print_rank_zero, rank
    from dci.finetuning.run_folder import CONCEPT_FILE, CONFIG_FILE, run_folder_of
    from dci.finetuning.signals import Interrupted
    from dci.finetuning.trainer import finetune
    from ldm.errors import UserError

    args.overrides += [f"{name}={value}" for name in ("model", "checkpoint", "vae") if (value := getattr(args, name))]
    if args.lora:
        args.overrides.append(f"loras={json.dumps(args.lora)}")
    if args.resume:
        args.overrides.append(f"resume={args.resume}")
    file = args.config or run_folder_of(args.resume) / CONFIG_FILE
    config = finetune_config(file, args.overrides, args.name)
    if config.training.trainable == "none" and (args.rank or args.energy):
        raise UserError("training.trainable=none learns tokens and no weights: leave out --rank and --energy")
    model = load_with_loras(config.model, config.checkpoint, config.loras, config.vae).to(
        own_device(pick_device(args.device))
    )
    entries = concepts_of(config)
    for entry in entries:
        print_rank_zero(f"Learning '{entry.class_noun}' from {entry.images} on the model '{model.config.name}'")
    try:
        run_folder = finetune(model, config, Path(args.logdir))
    except Interrupted as stop:
        print_rank_zero(str(stop))
        sys.exit(0 if rank() else stop.exit_code)  # the first process speaks for all
    except UserError:
        if rank():
            sys.exit(2)
        raise
    if rank() == 0:
        concept = run_folder / CONCEPT_FILE
        if args.rank is not None or args.energy is not None:
            compress_file(args, concept, concept, load_with_loras(config.model, config.checkpoint, config.loras, config.vae))
        print(f"Run folder: {run_folder}")
        marks = ["V*"] if len(entries) == 1 else [f"V{i + 1}*" for i in range(len(entries))]
        named = " and ".join(f"a {mark} {entry.class_noun}" for mark, entry in zip(marks, entries, strict=True))
        print_how_to_sample(concept, f"{named} on the beach", config.training.steps)


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a file of configs/train/, or one of your own")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run (a folder, or a checkpoint of it), or auto")
    parser.add_argument("--name", help="ends the run folder's name (default: the configuration's)")
    parser.add_argument("--logdir", default="logs", help="where the run folder is made (default logs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--model", help="base model: YAML, weights' file, diffusers folder or hub id (model=...)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights in place of the model's own (checkpoint=...)")
    parser.add_argument("--vae", help="autoencoder in place of the model's own (vae=...)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:0.8]",
        help="put a LoRA (a style) on the base model first; may be repeated (loras=[...])",
    )
    add_rank_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="options in place of the file's")
    return parser
