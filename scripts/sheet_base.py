"""Render the embedded base model's contact sheet: "a <noun> <place>" for pairs that cover its world.

python scripts/sheet_base.py --out docs/base-model.png
"""

import clone  # noqa: F401

from dci.cli.arguments import Parser, image_file, positive, run, seed
from dci.cli.loading import TINY, pick_device


def main() -> None:
    """Generate an image for each prompt, and save all of them as one captioned sheet."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=image_file, required=True, help="the sheet's file")
    parser.add_argument("--images", type=positive, default=48)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", type=positive, help="solver steps (default: the model's)")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    from PIL import Image
    from tqdm import tqdm

    from dci.dual_branch.options import sampling_options
    from ldm.checkpoint import load_model
    from ldm.images import captioned_grid
    from ldm.pretraining.evaluation import generate_images
    from ldm.pretraining.world import all_prompts

    model = load_model(args.model).to(pick_device(args.device))
    options = sampling_options(model, seed=args.seed, steps=args.steps)
    prompts = all_prompts(args.images)
    with tqdm(total=len(prompts), unit="image") as bar:
        generated = generate_images(model, prompts, 1, options, batch_size=16, progress=bar.update)
    images = [Image.fromarray(image) for image in generated.permute(0, 2, 3, 1).numpy()]
    captioned_grid(images, prompts, columns=8, scale=2).quantize(256).save(args.out, optimize=True)
    print(f"Sheet: {args.out}")


if __name__ == "__main__":
    run(main)
