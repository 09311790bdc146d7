"""Train one part of the embedded default model, or one encoder, on the toy world of labelled images.

python scripts/pretrain.py --config configs/pretrain/vae.yaml [key=value ...]
"""

import clone  # noqa: F401

from dci.cli.arguments import Parser, image_file, run
from ldm.shipped import ROOT


def main() -> None:
    """Train, export the last checkpoint, or only write the preview sheet, as the options say."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/pretrain/vae.yaml, diffusion.yaml, clip.yaml, ...")
    parser.add_argument(
        "--preview", type=image_file, metavar="PNG", help="only write a sheet of the world's first images with captions"
    )
    parser.add_argument("--export", action="store_true", help="save the last checkpoint's weights without training on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options in place of the file's")
    args = parser.parse_args()

    from ldm import config
    from ldm.pretraining.config import PretrainConfig
    from ldm.pretraining.run import pretrain

    options = config.load(PretrainConfig, args.config, args.overrides)
    if args.preview:
        from ldm.pretraining.artwork import load_artwork
        from ldm.pretraining.world import preview

        preview(load_artwork(ROOT / options.world.artwork, options.world.wide), options.world.seed, 128).save(args.preview)
        print(f"Sheet: {args.preview}")
        return
    pretrain(options, ROOT, args.export)


if __name__ == "__main__":
    run(main)
