"""Merge separately trained concepts into one file, in closed form (Custom Diffusion's constrained least squares).

python scripts/merge_concepts.py A.safetensors B.safetensors --out C.safetensors
"""

from dci.cli.arguments import Parser
from dci.cli.loading import load_concept_base
from ldm.shipped import ROOT, find


def main() -> None:
    """Merge the concepts, save the result, and print how far words and captions have moved."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("concepts", nargs="+", metavar="CONCEPT", help="two or more concept files of one base model")
    parser.add_argument("--out", required=True, help="the merged concept's file")
    parser.add_argument(
        "--captions",
        default=str(ROOT / "data/captions.txt"),
        help="captions whose keys and values should change least, one in each line",
    )
    parser.add_argument("--prompt", default="photo of a {}", help="the prompt in which target words keep theirs")
    parser.add_argument("--model", help="model configuration (default: the first concept's own)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the configuration's own")
    args = parser.parse_args()

    from dci.concept.concept_file import Concept
    from dci.concept.merging import merge
    from ldm.errors import UserError

    concepts = [Concept.load(file) for file in args.concepts]
    file = find(args.captions)
    if not file.is_file():
        raise UserError(f"no file {args.captions}: give one with a caption in each line")
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    model = load_concept_base(args, concepts[0])
    merged = merge(concepts, model, captions, args.prompt, print)
    merged.concept.save(args.out)
    print(f"Target words keep their keys and values to {merged.kept:.1e}, captions change by {merged.changed:.4f}")
    for name in merged.concept.names:
        print(f"  {' '.join(name.modifier_tokens)} {name.class_noun}")
    print(f"Merged concept: {args.out}")
