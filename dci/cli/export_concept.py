"""Write a concept for the programs that images are made with: its weights, its tokens, and a card that says how.

python scripts/export_concept.py logs/RUN/concept.safetensors --to lora --out exported

lora        A1111, Forge, ComfyUI, InvokeAI, diffusers, sd-scripts; exact without --rank
diff        A1111, Forge, ComfyUI, InvokeAI; exact, half the size
diffusers   Custom Diffusion's processors and tokens for diffusers
adobe       delta.ckpt and delta.bin of Custom Diffusion
checkpoint  the whole model with the concept in it, fp16; with --folder as a diffusers folder
"""

import argparse
from pathlib import Path

from dci.cli.arguments import Parser, positive
from dci.cli.loading import base_vae, load_concept_base


def main() -> None:
    """Convert the concept, and print the files that were written."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept", metavar="CONCEPT", help="a concept file")
    parser.add_argument(
        "--to", required=True, choices=["lora", "diff", "diffusers", "adobe", "checkpoint"], help="the format"
    )
    parser.add_argument("--rank", type=positive, help="lora: of each change; its error is printed (default: exact)")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go (default: NAME-FORMAT)")
    parser.add_argument(
        "--name",
        help="the word for the concept there, and the files' (default: my and the class noun); "
        "of several concepts with commas",
    )
    parser.add_argument("--bundle", action="store_true", help="lora, diff: the tokens into the weights' file too")
    parser.add_argument("--folder", action="store_true", help="checkpoint: a diffusers folder, not a single file")
    parser.add_argument("--model", help="base model (default: the concept's own)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the model's own")
    parser.add_argument("--vae", metavar="FILE", help="checkpoint: an autoencoder in place of the model's own")
    args = parser.parse_args()

    from dci.concept.concept_file import Concept
    from dci.concept.foreign.export import export
    from ldm.errors import UserError

    whole = args.to == "checkpoint"
    if args.vae and not whole:
        raise UserError(f"--vae is for --to checkpoint: --to {args.to} writes no autoencoder, leave it out")
    concept = Concept.load(args.concept)
    words = [word.strip() for word in args.name.split(",")] if args.name else None
    model = load_concept_base(args, concept, base_vae(args, concept.trained_on) if whole else None, mapped=True)
    folder = Path(args.out or f"{args.name or 'my' + concept.class_noun.replace(' ', '')}-{args.to}")
    done = export(concept, model, args.to, folder, words, args.rank, args.bundle, args.folder)
    for line in done.said:
        print(line[0].upper() + line[1:])
    for file in done.files:
        inside = file.rglob("*") if file.is_dir() else [file]
        size = sum(part.stat().st_size for part in inside if part.is_file())
        print(f"{file}: {size / 1e6:.2f} MB" if size > 1e5 else f"{file}: {size / 1e3:.1f} kB")
    print(f"In prompts: {done.prompt}; {done.files[-1]} says where the files go")
    print(f"Not carried: the contexts{'' if whole else ', and a check of the base model'}")
