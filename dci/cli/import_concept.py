"""Make a concept file of files from other programs: LoRA, differences, embeddings, Custom Diffusion's deltas, tuned models.

python scripts/import_concept.py lora.safetensors --class-noun dog --trigger sks --model BASE --out dog.safetensors
python scripts/import_concept.py delta.ckpt --class-noun dog --model BASE --out dog.safetensors

Several files make one concept: a LoRA and the embedding of its token, or an embedding for each token.
"""

import argparse
from functools import partial

from dci.cli.arguments import Parser, as_options
from ldm.shipped import find


def main() -> None:
    """Read the foreign files, convert them, and save them as one concept file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what the concept is in: weights, tokens, or both")
    parser.add_argument("--class-noun", help="the ordinary word for the concept, such as dog; of several with commas")
    parser.add_argument("--trigger", metavar="WORD", help="the words for it in prompts, where no token was learned")
    parser.add_argument("--weights", choices=["all", "cross-attention"], default="all", help="of a tuned model's difference")
    parser.add_argument("--out", required=True, help="the concept's file")
    parser.add_argument("--model", help="the base model that it was made on: its fingerprint is kept, and checked later")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the model's own")
    args = parser.parse_args()

    import dataclasses

    from dci.concept.foreign.importing import import_concept
    from dci.concept.prompts import parse_prompt
    from ldm.checkpoint import load_model, model_config

    model = args.model or args.checkpoint
    checkpoint = args.checkpoint if args.model else None
    load = partial(load_model, model, checkpoint, dtype=None) if model else None
    config = model_config(model) if model else None
    found = import_concept(args.files, args.class_noun, args.trigger, config, load, args.weights)
    print("\n".join(map(as_options, found.said)))
    names = found.concept.names
    marks = ["V*"] if len(names) == 1 else [f"V{i + 1}*" for i in range(len(names))]
    prompt = " and ".join(f"a {mark} {name.class_noun}" for mark, name in zip(marks, names, strict=True))
    parse_prompt(prompt, names)  # refuses now a noun or trigger that no prompt could hold
    own = {"model": _absolute(model), "checkpoint": _absolute(checkpoint)} if model else {}
    concept = dataclasses.replace(found.concept, config={**found.concept.config, **own})
    concept.save(args.out)
    print(f"Concept: {args.out}; in prompts: {prompt}")


def _absolute(name: str | None) -> str | None:
    """A file's whole path; hub ids stay as they are."""
    return str(find(name).resolve()) if name and find(name).exists() else name
