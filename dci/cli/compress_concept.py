"""Make a concept file small: the change of each weight as a product of two thin matrices (SVD).

python scripts/compress_concept.py logs/RUN/concept.safetensors --rank 16 --out small.safetensors
"""

from pathlib import Path

from dci.cli.arguments import Parser, add_rank_options, check_rank_options
from dci.cli.loading import compress_file, load_concept_base


def main() -> None:
    """Write the smaller file, and print its size and the error of the approximation."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("concept", metavar="CONCEPT", help="a concept file")
    parser.add_argument("--out", required=True, help="the small concept file")
    add_rank_options(parser)
    parser.add_argument("--model", help="model configuration (default: the concept's own)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the configuration's own")
    args = parser.parse_args()

    from dci.concept.concept_file import Concept
    from ldm.errors import UserError

    if args.rank is None and args.energy is None:
        raise UserError("give --rank or --energy: how much of the change to keep")
    check_rank_options(args)
    model = load_concept_base(args, Concept.load(args.concept))
    compress_file(args, Path(args.concept), Path(args.out), model)
