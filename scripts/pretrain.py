"""Train one part of the embedded default model on the small world of labelled pictures.

python scripts/pretrain.py --config configs/pretrain/vae.yaml [key=value ...]
"""

from common import ROOT, Parser, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/pretrain/vae.yaml or diffusion.yaml")
    parser.add_argument("--export", action="store_true", help="save the last checkpoint's weights without training on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options in place of the file's")
    args = parser.parse_args()

    from ldm import config
    from ldm.pretraining.config import PretrainConfig
    from ldm.pretraining.run import pretrain

    pretrain(config.load(PretrainConfig, args.config, args.overrides), ROOT, args.export)


if __name__ == "__main__":
    run(main)
