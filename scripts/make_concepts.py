"""Draw the demo concepts of data/concepts/ anew from the artwork (bash scripts/fetch_artwork.sh).

python scripts/make_concepts.py
"""

from pathlib import Path

from common import ROOT, Parser, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--artwork", default=str(ROOT / ".artwork"), help="folder of scripts/fetch_artwork.sh")
    parser.add_argument("--outdir", default=str(ROOT / "data/concepts"))
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()

    from ldm.pretraining.concepts import CONCEPTS, STUDY_CONCEPTS, render_concept

    for name, concept in {**CONCEPTS, **STUDY_CONCEPTS}.items():
        folder = Path(args.outdir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(render_concept(args.artwork, concept, args.seed)):
            picture.save(folder / f"{index:02}.png", optimize=True)
        print(folder)


if __name__ == "__main__":
    run(main)
