"""Ask a person about blind pairs of images, on a page of this machine: which is more the thing, which obeys the prompt more?

python scripts/rate.py DCI=outputs/A plain=outputs/B --answers answers.csv
python scripts/rate.py outputs/sweeps/tiny --answers answers.csv --most 100
python scripts/evaluate.py --samples DCI=outputs/A plain=outputs/B --answers answers.csv --out reports/cat

Answers are kept one by one; the same command goes on with what is not answered yet.
"""

from pathlib import Path

from dci.cli.arguments import Parser, port, positive, seed
from dci.cli.evaluate import named_folders


def arguments():
    """Parse the folders to compare, the file of answers and the page's options."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="two or more folders with samples/ and prompts.json, or a grid's"
    )
    parser.add_argument("--answers", default="answers.csv", metavar="CSV", help="keeps the answers (default answers.csv)")
    parser.add_argument(
        "--references", nargs="+", type=Path, default=[], metavar="FOLDER", help="the concept's images (default: recorded)"
    )
    parser.add_argument("--rater", metavar="NAME", help="a name that goes with the answers; each has questions of their own")
    parser.add_argument("--most", type=positive, metavar="N", help="pairs at most, chosen by chance (default: all)")
    parser.add_argument("--seed", type=seed, default=0, help="of the pairs' order and sides (default 0)")
    parser.add_argument("--port", type=port, help="of the page (default: a free one)")
    return parser.parse_args()


def main() -> None:
    """Serve the questions that are still open, until Ctrl-C."""
    args = arguments()

    from dci.evaluation.pairs import images_of, make_pairs
    from dci.evaluation.rating_page import Session, address, serve

    pairs = make_pairs(images_of(named_folders(args.folders), args.references), args.seed, args.most)
    session = Session(pairs, args.answers, args.rater or "")
    with serve(session, args.port or 0) as server:
        waiting = len(session.open())
        print(f"{waiting} of {len(session.asked)} questions about {len(pairs)} pairs are open; answers go to {args.answers}")
        print(f"Page: {address(server)}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
