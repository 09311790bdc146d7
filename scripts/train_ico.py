"""Learn a concept from a folder of pictures by image-specific context optimization (ICO).

python scripts/train_ico.py --config configs/train/ico-tiny.yaml data.images=FOLDER concept.class_noun=dog
"""

from pathlib import Path

from common import Parser, pick_device, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/train/ico-tiny.yaml, or one of your own")
    parser.add_argument("--name", help="ends the run folder's name (default: the configuration's)")
    parser.add_argument("--logdir", default="logs", help="where the run folder is made (default logs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="options in place of the file's")
    args = parser.parse_args()

    from dci.finetune import CONCEPT_FILE, finetune
    from dci.settings import finetune_config
    from ldm.checkpoint import load_model

    config = finetune_config(args.config, args.overrides, args.name)
    model = load_model(config.model, config.checkpoint).to(pick_device(args.device))
    print(f"Learning '{config.concept.class_noun}' from {config.data.images} on the model '{model.config.name}'")
    run_folder = finetune(model, config, Path(args.logdir))
    print(f"Run folder: {run_folder}")
    print(
        f"Draw it with: python scripts/sample_dci.py --concept {run_folder / CONCEPT_FILE}"
        f' --prompt "a V* {config.concept.class_noun} on the beach"'
    )


if __name__ == "__main__":
    run(main)
