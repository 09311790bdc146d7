"""Render the demo concepts of data/concepts/ anew from the artwork (bash scripts/fetch_artwork.sh).

python scripts/make_concepts.py [--concepts teddy,boot]
"""

from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, run, seed
from ldm.shipped import ROOT


def main() -> None:
    """Render the chosen concepts, a folder of images each."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--artwork", default=str(ROOT / ".artwork"), help="folder of scripts/fetch_artwork.sh")
    parser.add_argument("--outdir", default=str(ROOT / "data/concepts"))
    parser.add_argument("--concepts", help="names with commas between them (default: all)")
    parser.add_argument("--seed", type=seed, default=1000)
    args = parser.parse_args()

    from ldm.errors import UserError
    from ldm.pretraining.concepts import CONCEPTS, NOTO_CONCEPTS, STUDY_CONCEPTS, render_concept

    concepts = CONCEPTS | STUDY_CONCEPTS | NOTO_CONCEPTS
    names = args.concepts.split(",") if args.concepts else list(concepts)
    if unknown := set(names) - concepts.keys():
        raise UserError(f"unknown concept '{min(unknown)}': expected one of {', '.join(concepts)}")
    for name in names:
        folder = Path(args.outdir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(render_concept(args.artwork, concepts[name], args.seed)):
            image.save(folder / f"{index:02}.png", optimize=True)
        print(folder)


if __name__ == "__main__":
    run(main)
