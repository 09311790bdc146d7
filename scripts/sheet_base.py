"""Render the embedded base model's contact sheet: "a <noun> <place>" for pairs that cover its world, or prompts of a file.

python scripts/sheet_base.py --out docs/base-model.png
python scripts/sheet_base.py --prompts data/prompts/pairs.txt --nouns dog,cat,car,bus --each 2 --out pairs.png
"""

from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, image_file, positive, run, seed
from dci.cli.loading import TINY, pick_device


def main() -> None:
    """Generate an image for each prompt, and save all of them as one captioned sheet."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=image_file, required=True, help="the sheet's file")
    parser.add_argument("--images", type=positive, default=48)
    parser.add_argument(
        "--prompts", type=Path, help="prompts, one in each line with {} for the noun: a row of the sheet for each noun"
    )
    parser.add_argument("--nouns", help="with --prompts: nouns with commas between them")
    parser.add_argument("--each", type=positive, default=1, help="with --prompts: images of each (default 1)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", type=positive, help="solver steps (default: the model's)")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if (args.prompts is None) != (not (args.nouns or "").strip(", ")):
        parser.error("--prompts and --nouns go together: give the file of prompts, and the nouns that {} stands for")
    if args.each > 1 and not args.prompts:
        parser.error("--each is for --prompts: without them every prompt is another")

    from PIL import Image
    from tqdm import tqdm

    from dci.dual_branch.options import sampling_options
    from dci.files import read_prompts
    from ldm.checkpoint import load_model
    from ldm.errors import UserError
    from ldm.images import captioned_grid
    from ldm.pretraining.evaluation import generate_images
    from ldm.pretraining.world import all_prompts, with_article

    model = load_model(args.model).to(pick_device(args.device))
    options = sampling_options(model, seed=args.seed, steps=args.steps)
    prompts, columns = all_prompts(args.images), 8
    if args.prompts:
        patterns = read_prompts(args.prompts)
        if without := [pattern for pattern in patterns if "{}" not in pattern]:
            raise UserError(f"{args.prompts}: '{without[0]}' has no {{}} for the noun: write one in each prompt")
        nouns = [noun.strip() for noun in args.nouns.split(",") if noun.strip()]
        prompts = [pattern.replace("a {}", with_article(noun)).replace("{}", noun) for noun in nouns for pattern in patterns]
        columns = len(patterns) * args.each
    with tqdm(total=len(prompts) * args.each, unit="image") as bar:
        generated = generate_images(model, prompts, args.each, options, batch_size=16, progress=bar.update)
    images = [Image.fromarray(image) for image in generated.permute(0, 2, 3, 1).numpy()]
    captions = [prompt for prompt in prompts for _ in range(args.each)]
    sheet = captioned_grid(images, captions, columns, scale=2)
    sheet.quantize(256).save(args.out, optimize=True)
    print(f"Sheet: {args.out}")


if __name__ == "__main__":
    run(main)
