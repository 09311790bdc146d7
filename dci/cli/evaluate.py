"""Measure fidelity and editability of generated images: CLIP-T, CLIP-I, DINO-I, KID, with intervals, and make a report.

python scripts/evaluate.py --samples dci=outputs/A plain=outputs/B --out reports/cat
"""

import os
from pathlib import Path

from dci.cli.arguments import Parser, positive, seed
from dci.cli.loading import pick_device
from dci.files import check_folder
from ldm.errors import UserError


def arguments():
    """Parse the folders to score, the encoders and the report's options."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]FOLDER",
        help="folders with samples/ and prompts.json, a row of the table each",
    )
    parser.add_argument(
        "--references",
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="the concept's images, for several concepts a folder each (default: recorded)",
    )
    parser.add_argument("--regularization", metavar="FOLDER", help="real images of the class, for KID")
    parser.add_argument(
        "--class-noun",
        nargs="+",
        action="extend",
        default=[],
        metavar="NOUN",
        help="for prompts that say V* or {} alone; for several concepts a noun each",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--title", default="Fidelity and editability")
    parser.add_argument("--ratings", metavar="CSV", help="the report's images.csv with further columns of numbers")
    parser.add_argument("--answers", metavar="CSV", help="what people answered, as dci rate writes it")

    group = parser.add_argument_group(
        "encoders",
        "tiny (the embedded ones), open_clip:ARCHITECTURE/TAG, timm:NAME, transformers:NAME or transformers:FOLDER, "
        "dinov2:vits14 (vitb14, vitl14, vitg14, each with _reg), dreamsim:FOLDER",
    )
    group.add_argument("--clip", default="tiny", help="for CLIP-T and CLIP-I (default tiny)")
    group.add_argument("--instance", default="tiny", help="for DINO-I (default tiny)")
    group.add_argument(
        "--kid",
        help="for KID; also inception or inception:FILE (default: Inception if it is on this "
        "machine and no encoder is tiny, or else as --instance)",
    )
    group.add_argument("--clip-t-w2.5", action="store_true", help="add Custom Diffusion's text score, 2.5 max(cos, 0)")
    group.add_argument(
        "--object-only",
        action="store_true",
        help="CLIP-I and DINO-I see what the masks beside references and images mark (NAME.mask.png), on white; "
        "images without a mask count whole",
    )
    group.add_argument("--offline", action="store_true", help="never ask a hub, take what is on this machine")

    group = parser.add_argument_group("statistics and machine")
    group.add_argument("--resamples", type=positive, default=9999, help="of the bootstrap (default 9999)")
    group.add_argument("--seed", type=seed, default=0, help="of the bootstrap and of KID's subsets (default 0)")
    group.add_argument("--cache", metavar="FILE", help="keeps features for the next time (default DIR/features.sqlite)")
    group.add_argument("--batch-size", type=positive, default=32)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args()


def main() -> None:
    """Score every folder of images, print the table and write the report."""
    args = arguments()
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    folders = named_folders(args.samples)

    from tqdm import tqdm

    from dci.evaluation.answers import read_answers
    from dci.evaluation.evaluate import Scoring, ScoringObservers, evaluate_folder, load_encoders
    from dci.evaluation.feature_cache import FeatureStore
    from dci.evaluation.ratings import with_ratings
    from dci.evaluation.report import TEXT, write_report
    from dci.evaluation.scores import RunScores

    answers = read_answers(args.answers) if args.answers else []
    check(args, folders, answers)
    printed: dict[str, None] = {}  # once, not for each folder of samples

    def report(line: str) -> None:
        if line not in printed:
            tqdm.write(line)
        printed[line] = None

    encoders = load_encoders(args.clip, args.instance, args.kid, pick_device(args.device))
    scoring = Scoring(
        args.regularization,
        args.class_noun,
        getattr(args, "clip_t_w2.5"),
        args.batch_size,
        args.resamples,
        args.seed,
        args.object_only,
    )
    store, runs = FeatureStore(args.cache or Path(args.out) / "features.sqlite"), []
    for name, folder in folders.items():
        with tqdm(desc=name, unit=" features") as bar:
            observers = ScoringObservers(bar.update, report)
            scores = evaluate_folder(folder, args.references, encoders, scoring, store, observers)
        runs.append(RunScores(name, scores))
    runs = with_ratings(runs, args.ratings) if args.ratings else runs
    page = write_report(args.out, runs, args.title, answers=answers)
    print((Path(args.out) / TEXT).read_text(encoding="utf-8"))
    print(f"Page: {page}")


def check(args, folders: dict[str, Path], answers: list) -> None:
    """Raise UserError for what would only show after weights are loaded and images scored."""
    from dci.evaluation.answers import check_answered
    from dci.evaluation.evaluate import check_encoders, check_images
    from dci.evaluation.ratings import check_rated, read_ratings
    from dci.samples.reader import read_samples

    check_encoders(args.clip, args.instance, args.kid)
    check_folder(args.out, "--out")
    found = {name: read_samples(folder, args.class_noun) for name, folder in folders.items()}
    for folder in folders.values():
        check_images(folder, args.references, args.regularization)
    images = [(name, str(image.file)) for name, of_folder in found.items() for image in of_folder]
    if args.ratings:
        check_rated(read_ratings(args.ratings), images, args.ratings)
    check_answered(answers, images)


def named_folders(given: list[str]) -> dict[str, Path]:
    """Return name -> folder of `[NAME=]FOLDER` arguments; a folder without a name goes by its own."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        named = equals and not os.path.exists(text) and "/" not in name  # a folder's own name may have "=" in it
        name, folder = (name, folder) if named else (Path(text).resolve().name, text)
        if not name or name in folders:
            raise UserError(f"{text}: the name '{name}' is {'taken' if name else 'empty'}: write NAME=FOLDER")
        if twice := [other for other, known in folders.items() if known.resolve() == Path(folder).resolve()]:
            raise UserError(f"{text}: '{twice[0]}' is this folder already: give each folder once")
        folders[name] = Path(folder)
    return folders
