"""Learn a concept from a folder of pictures: ICO, Custom Diffusion, textual inversion.

python scripts/train_ico.py --config configs/train/ico-tiny.yaml data.images=FOLDER concept.class_noun=dog
python scripts/train_ico.py --resume logs/RUN
"""

import sys
from pathlib import Path

from common import Parser, add_rank_options, check_rank_options, compress_file, pick_device, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a file of configs/train/, or one of your own")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run (a folder, or a checkpoint of it), or auto")
    parser.add_argument("--name", help="ends the run folder's name (default: the configuration's)")
    parser.add_argument("--logdir", default="logs", help="where the run folder is made (default logs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--model", help="base model: YAML, weights' file, diffusers folder or hub id (model=...)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights in place of the model's own (checkpoint=...)")
    add_rank_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="options in place of the file's")
    args = parser.parse_args()
    if not args.config and args.resume in (None, "auto"):
        parser.error("give --config FILE, or --resume RUN to go on with a run")
    check_rank_options(args)

    from dci.config import subjects
    from dci.finetune import finetune
    from dci.interruption import Interrupted
    from dci.processes import own_device, rank, say
    from dci.runs import CONCEPT_FILE, CONFIG_FILE, run_folder_of
    from dci.settings import finetune_config
    from dci.watching import say_how_to_draw
    from ldm.checkpoint import load_model
    from ldm.errors import UserError

    args.overrides += [f"{name}={value}" for name in ("model", "checkpoint") if (value := getattr(args, name))]
    if args.resume:
        args.overrides.append(f"resume={args.resume}")
    file = args.config or run_folder_of(args.resume) / CONFIG_FILE
    config = finetune_config(file, args.overrides, args.name)
    if config.training.trainable == "none" and (args.rank or args.energy):
        raise UserError("training.trainable=none learns tokens and no weights: leave out --rank and --energy")
    model = load_model(config.model, config.checkpoint).to(own_device(pick_device(args.device)))
    entries = subjects(config)
    for entry in entries:
        say(f"Learning '{entry.class_noun}' from {entry.images} on the model '{model.config.name}'")
    try:
        run_folder = finetune(model, config, Path(args.logdir))
    except Interrupted as stop:
        say(str(stop))
        sys.exit(0 if rank() else stop.exit_code)  # the first process speaks for all
    except UserError:
        if rank():
            sys.exit(2)
        raise
    if rank() == 0:
        concept = run_folder / CONCEPT_FILE
        if args.rank is not None or args.energy is not None:
            compress_file(args, concept, concept, load_model(config.model, config.checkpoint))
        print(f"Run folder: {run_folder}")
        marks = ["V*"] if len(entries) == 1 else [f"V{i + 1}*" for i in range(len(entries))]
        named = " and ".join(f"a {mark} {entry.class_noun}" for mark, entry in zip(marks, entries, strict=True))
        say_how_to_draw(concept, f"{named} on the beach", config.training.steps)


if __name__ == "__main__":
    run(main)
