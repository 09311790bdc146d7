"""Train one concept by each method from one seed, draw the same prompts with all of them, make a sheet and a table.

python scripts/compare_methods.py --outdir outputs/methods --sheet docs/methods.png

Repeating the command goes on where it stopped. Each method's pictures lie in OUTDIR/METHOD with their
prompts.json, as sample_dci.py writes them.
"""

import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, Parser, positive, run

METHODS = ("ico", "custom-diffusion", "textual-inversion", "ico-no-suffix", "ico-shared-context")
PROMPTS = ("a photo of a V*", "a V* on the beach", "a V* in the snow", "a V* in the forest", "a V* at night")
PAGE = """# Methods of fine-tuning, side by side

One concept learned by each method from one seed, as `configs/train/METHOD-tiny.yaml` has it, and drawn {sampling} in each
of the embedded world's places. Likeness is the mean cosine to the reference pictures by the instance encoder, the place
is right by the classifier (`data/tiny/README.md`). With one concept and one seed, a few hundredths or percent say little.

| method | likeness to the references | place right | pictures |
|---|---|---|---|
{rows}

![a row for each method]({sheet})

A row for each method, the first two pictures of each prompt: {prompts}.
"""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", default="outputs/methods", help="for runs and pictures (default outputs/methods)")
    parser.add_argument("--sheet", help="the sheet's file (default OUTDIR/methods.png)")
    parser.add_argument("--n-samples", type=positive, default=4, help="pictures of each prompt (default 4)")
    parser.add_argument("--no-dci", action="store_true", help="plain sampling for all methods")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="training options for all methods")
    args = parser.parse_args()

    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    prompts = outdir / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    for method in METHODS:
        config = ROOT / f"configs/train/{method}-tiny.yaml"
        print(f"== {method}", flush=True)
        logdir = outdir / "logs" / method
        call("train_ico.py", "--config", config, "--logdir", logdir, "resume=auto", *args.overrides)
        concept = max(logdir.glob("*/concept.safetensors"))
        call("sample_dci.py", "--concept", concept, "--from-file", prompts, "--n-samples", args.n_samples,
             "--outdir", outdir / method, *(["--no-dci"] if args.no_dci else []))  # fmt: skip
    concepts = [max((outdir / "logs" / method).glob("*/concept.safetensors")) for method in METHODS]
    dci = [] if args.no_dci else ["--dci"]
    call("sheet_places.py", *(part for file in concepts for part in ("--concept", file)), *dci,
         "--out", outdir / "places", "--n-samples", args.n_samples)  # fmt: skip
    sheet = Path(args.sheet or outdir / "methods.png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    sampling = "by plain sampling" if args.no_dci else "with DCI"
    write_page(json.loads((outdir / "places.json").read_text()), sheet, sampling)
    draw_sheet(outdir, args.n_samples, sheet)
    print(f"Sheet: {sheet}")


def write_page(results: dict[str, dict], sheet: Path, sampling: str) -> None:
    """Write fidelity (likeness to the references) and editability (place right) of each method as Markdown."""
    rows = [
        f"| {method} | {result['likeness']:.3f} | {result['place_right']:.1%} | {result['pictures']} |"
        for method, result in zip(METHODS, results.values(), strict=True)
    ]
    file = sheet.with_suffix(".md")
    file.write_text(PAGE.format(rows="\n".join(rows), sheet=sheet.name, prompts="; ".join(PROMPTS), sampling=sampling))
    print(f"Table: {file}")


def call(script: str, *args: object) -> None:
    """Run one of the programs beside this one; its error is this program's."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, args)])
    if done.returncode:
        sys.exit(done.returncode)


def draw_sheet(outdir: Path, number: int, file: Path) -> None:
    """A row for each method, the first two pictures of each prompt side by side."""
    from ldm.images import captioned_grid, read_picture

    shown = min(2, number)
    places = [(method, p, i) for method in METHODS for p in range(len(PROMPTS)) for i in range(shown)]
    pictures = [read_picture(outdir / method / f"samples/{p * number + i:05}.png") for method, p, i in places]
    captions = [method if p == i == 0 else PROMPTS[p] if i == 0 else "" for method, p, i in places]
    captioned_grid(pictures, captions, shown * len(PROMPTS), scale=2).save(file)


if __name__ == "__main__":
    run(main)
