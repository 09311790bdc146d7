"""Find what decides ICO's gain in fidelity over Custom Diffusion: the drawing, its colours, its size, the steps.

python scripts/study_gain.py --make --artwork .artwork        # the study's concepts and suite; bash scripts/fetch_artwork.sh
python scripts/compare.py --config outputs/study-gain/suite.yaml
python scripts/study_gain.py                                  # gains by factor, and against the distance from the base
python scripts/study_gain.py --suite configs/eval/tiny.yaml --methods ico,custom-diffusion      # any suite's concepts
python scripts/study_gain.py --suite configs/eval/tiny.yaml --reports docs/results-tiny docs/results-tiny/noto \
    docs/results-tiny/equal --rows 'ico, plain' 'custom-diffusion-steps=200, plain'            # rows of stored reports

Each of eight nouns has five concepts that differ in one factor alone (ldm/pretraining/study.py), learned by both methods
with two numbers of steps; --nouns cake,house and --steps 100 make a smaller study. --metric clip_t does the same for
editability, --setting dci with DCI.
"""

import json
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, positive, run, seed
from ldm.shipped import ROOT

FOLDER = Path("outputs/study-gain")
STEPS = (100, 400)


def main() -> None:
    """Write the study's concepts and suite, or print what its results say."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", action="store_true", help="render the study's concepts, and write its suite")
    parser.add_argument("--nouns", help="with --make: some of the study's, between commas (default: all eight)")
    parser.add_argument("--steps", help=f"of the study's trainings (default {','.join(map(str, STEPS))})")
    parser.add_argument("--artwork", default=str(ROOT / ".artwork"), help="folder of scripts/fetch_artwork.sh")
    parser.add_argument("--suite", default=str(FOLDER / "suite.yaml"), help="whose results are read (default: the study's)")
    parser.add_argument("--methods", help="method and baseline (default: those of each number of steps)")
    parser.add_argument("--reports", nargs="+", help="folders of reports with the suite's concepts, in place of its results")
    parser.add_argument("--rows", nargs=2, metavar="ROW", help="with --reports: a row, and the one it is compared with")
    parser.add_argument("--setting", default="plain", help="of the suite (default plain)")
    parser.add_argument("--metric", default="dino_i", help="default dino_i")
    parser.add_argument("--base-images", type=positive, default=16, help="of the base model for each noun (default 16)")
    parser.add_argument("--seed", type=seed, default=1000)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the suite, such as name= or outdir=")
    args = parser.parse_args()
    args.steps = steps_of(args.steps)
    if (args.reports is None) != (args.rows is None):
        parser.error("--reports and --rows go together: give the reports, and two of their rows")
    if args.make:
        make(args)
    else:
        report(args)


def steps_of(text: str | None) -> list[int]:
    """Return the numbers of steps that `--steps` names.

    Raises:
        UserError: one of them is no number above 0.
    """
    from ldm.errors import UserError

    parts = text.split(",") if text is not None else [str(number) for number in STEPS]
    for part in parts:
        if not part.strip().isdecimal() or not int(part):
            raise UserError(f"--steps {text}: expected numbers above 0 with commas between them, such as 100,400")
    return list(dict.fromkeys(int(part) for part in parts))


def nouns_of(text: str | None) -> list[str]:
    """Return the nouns that `--nouns` names; all of the study's without it.

    Raises:
        UserError: the study has no such noun.
    """
    from ldm.errors import UserError
    from ldm.pretraining.study import DRAWINGS

    nouns = [part.strip() for part in text.split(",")] if text is not None else list(DRAWINGS)
    for noun in nouns:
        if noun not in DRAWINGS:
            raise UserError(f"--nouns {text}: '{noun}' is none of the study's: {', '.join(DRAWINGS)}")
    return list(dict.fromkeys(nouns))


def make(args) -> None:
    """Write reference images of each noun and variant, and the suite that learns them."""
    import yaml

    from ldm.pretraining.study import VARIANTS, render_variant

    folder, concepts = Path(args.suite).parent, []
    for noun in nouns_of(args.nouns):
        for variant in VARIANTS:
            images = folder / "concepts" / f"{noun}-{variant}"
            images.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(render_variant(args.artwork, noun, variant, args.seed)):
                image.save(images / f"{index:02}.png")
            concepts.append({"name": f"{noun}-{variant}", "class_noun": noun, "images": str(images.resolve())})
    methods = [
        {"name": name, "config": str(ROOT / f"configs/train/{name}-tiny.yaml"), "vary": {"training.steps": args.steps}}
        for name in ("custom-diffusion", "ico")
    ]
    tiny = yaml.safe_load((ROOT / "configs/eval/tiny.yaml").read_text(encoding="utf-8"))
    suite = {key: tiny[key] for key in ("settings", "training", "sampling", "device", "workers")}
    suite |= {"name": "study-gain", "title": "What decides ICO's gain", "concepts": concepts, "methods": methods}
    suite |= {"prompts": str(ROOT / "data/prompts/tiny.txt"), "n_samples": 1}
    Path(args.suite).write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    print(f"{len(concepts)} concepts; next: python scripts/compare.py --config {args.suite}")


def report(args) -> None:
    """Print the gain of each variant and its effect, and the gains' rank correlation with what the base does not know."""
    from dci.evaluation.report import write_scores
    from dci.evaluation.scores import REPORT
    from dci.experiments.gain_study import effects, rank_correlation, runs_by_variant
    from dci.experiments.grid import grid_points
    from dci.experiments.suite import load_suite
    from ldm.errors import UserError

    suite = load_suite(args.suite, args.overrides)
    points = grid_points(suite)
    pairs = stored_gains(args) if args.reports else gains_by_pair(args, points)
    distances = distances_from_base(suite, args.base_images)
    content: dict[str, dict] = {"distance": distances}
    for (method, baseline), found in pairs.items():
        print(f"\n{args.metric} of {method} less {baseline}" + ("" if args.reports else f", {args.setting}") + ":")
        try:
            for effect in effects(found):
                print(f"  {effect.variant:10} {effect.gain}   less usual: {effect.effect or '-'}")
        except UserError:  # a suite whose concepts are no variants
            pass
        correlation = rank_correlation(distances, found)
        print(f"  rank correlation with the distance from the base model: {correlation}")
        content[method] = {name: sum(values.values()) / len(values) for name, values in found.items()}
        content[f"{method}, correlation"] = vars(correlation)
    folder = FOLDER.with_name(suite.name)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "report.json"
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nEach concept's gain and distance: {out}")
    if not args.reports and (runs := runs_by_variant(points, args.setting)):
        write_scores(folder / REPORT, runs, suite.title)
        print(f"Scores of each method and variant: {folder / REPORT}")


def gains_by_pair(args, points) -> dict:
    """Return the gains of each method over its baseline, from the suite's own results.

    Raises:
        UserError: `--methods` are not two, or the suite has no such results.
    """
    from dci.experiments.gain_study import gains
    from ldm.errors import UserError

    if args.methods and args.methods.count(",") != 1:
        raise UserError(f"--methods {args.methods}: expected the method and its baseline, such as ico,custom-diffusion")
    named = (
        [tuple(args.methods.split(","))]
        if args.methods
        else [(f"ico-steps={n}", f"custom-diffusion-steps={n}") for n in args.steps]
    )
    return {pair: gains(points, *pair, args.setting, args.metric) for pair in named}


def stored_gains(args) -> dict:
    """Return the gains of a row of stored reports over another.

    Raises:
        UserError: the reports have no such rows.
    """
    from dci.evaluation.scores import read_reports
    from dci.experiments.gain_study import gains_of
    from ldm.errors import UserError

    runs = read_reports(args.reports)
    for row in args.rows:
        if row not in runs:
            raise UserError(f"no row '{row}': expected two of {'; '.join(runs)}")
    return {tuple(args.rows): gains_of(runs[args.rows[0]], runs[args.rows[1]], args.metric)}


def distances_from_base(suite, images: int) -> dict[str, float]:
    """Return how far each concept is from what the base model knows: 1 less the best likeness of its images of the noun.

    By the embedded instance encoder, the mean over the references.
    """
    import torch

    from dci.cli.loading import TINY
    from dci.dual_branch.options import sampling_options
    from ldm.checkpoint import load_model
    from ldm.embedded_encoders import SIZE, load_instance_encoder
    from ldm.images import list_images, read_image, square, to_tensor
    from ldm.text_to_image import text_to_image

    model, encoder, known = load_model(TINY), load_instance_encoder(), {}
    options, distances = sampling_options(model, steps=20), {}
    with torch.inference_mode():
        for concept in suite.concepts:
            noun, files = concept.concepts[0].class_noun, list_images(concept.folders[0])
            if noun not in known:
                known[noun] = encoder.image_features(
                    text_to_image(model, f"a photo of a {noun}", list(range(images)), options)
                )
            own = encoder.image_features(torch.stack([to_tensor(square(read_image(file), SIZE)) for file in files]))
            distances[concept.name] = 1 - (own @ known[noun].T).max(-1).values.mean().item()
    return distances


if __name__ == "__main__":
    run(main)
