"""Say which difference between two runs a comparison over so many concepts can show, from the variance of a present one.

python scripts/power.py docs/results-tiny --run 'ico, dci' --against 'custom-diffusion, plain'
python scripts/power.py docs/results-tiny docs/results-tiny/noto --run 'ico, dci' --against 'custom-diffusion, plain'
python scripts/power.py docs/results-tiny --concepts 8,15,30 --prompts 20 --seeds 4
python scripts/power.py docs/results-tiny --difference 0.05      # how many concepts it takes
"""

from collections.abc import Iterator

from dci.cli.arguments import Parser, above_zero, number, positive, seed, whole_numbers
from ldm.errors import UserError

METRICS = "dino_i,clip_t"


def arguments():
    """Parse the results to start from and the designs to try."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "reports", nargs="+", help="folders of reports, or their scores.json; the same row of several is one"
    )
    parser.add_argument("--run", help="name of a table's row (default: the last one)")
    parser.add_argument("--against", help="name of the row it is compared with (default: the first one)")
    parser.add_argument("--metrics", default=METRICS, help=f"with commas between them (default {METRICS})")
    parser.add_argument("--concepts", type=whole_numbers, default=[8, 15, 24, 32], metavar="N,N", help="default 8,15,24,32")
    parser.add_argument("--prompts", type=positive, help="in place of the present number")
    parser.add_argument("--seeds", type=positive, help="images of each prompt, in place of the present number")
    parser.add_argument("--difference", type=above_zero, help="say how many concepts it takes to show this one")
    parser.add_argument("--power", type=number, default=0.8, help="share of repetitions that are to show it (default 0.8)")
    parser.add_argument("--repetitions", type=positive, default=200, help="simulated comparisons (default 200)")
    parser.add_argument("--resamples", type=positive, default=999, help="of the bootstrap of each (default 999)")
    parser.add_argument("--seed", type=seed, default=0)
    return parser.parse_args()


def main() -> None:
    """Print, for each metric, what varies and what the designs can show."""
    args = arguments()

    from dci.evaluation.power import difference_variances
    from dci.evaluation.scores import read_reports

    runs = read_reports(args.reports)
    ours, theirs = chosen(args.run, list(runs)[-1], runs), chosen(args.against, next(iter(runs)), runs)
    if ours == theirs:
        raise UserError(f"--run and --against are both '{ours}': give two of {', '.join(runs)}")
    found = {v.metric: v for v in difference_variances(runs[ours], runs[theirs])}
    for metric in args.metrics.split(","):
        if metric not in found:
            raise UserError(f"--metrics {metric}: expected some of {', '.join(found)}")
    print(f"{ours} less {theirs}: the smallest true difference that a 95 % interval shows in {args.power:.0%} of cases\n")
    for metric in args.metrics.split(","):
        print("\n".join(described(args, found[metric])), flush=True)


def chosen(name: str | None, default: str, runs: dict) -> str:
    """Return the name of a row; the default where none is given."""
    if name is not None and name not in runs:
        raise UserError(f"no row '{name}': expected one of {'; '.join(runs)}")
    return name or default


def described(args, variances) -> Iterator[str]:
    """Yield what a metric varies with, and a table of what designs show."""
    from dci.evaluation.power import concepts_needed, smallest_shown

    design = {name: getattr(args, name) for name in ("prompts", "seeds", "power", "repetitions", "resamples", "seed")}
    parts = sorted(variances.components.items(), key=lambda part: -part[1])
    yield f"{variances.metric}: standard deviation by " + ", ".join(f"{' x '.join(e)} {v**0.5:.3f}" for e, v in parts if v)
    if args.difference is not None:
        needed = concepts_needed(variances, args.difference, **design)
        yield f"  {args.difference:g} takes {f'{needed} concepts' if needed else 'more than 128 concepts'}"
        return
    yield "  | concepts | difference shown | half length of the interval |\n  |---|---|---|"
    for concepts in args.concepts:
        shown = smallest_shown(variances, concepts, **design)
        yield f"  | {concepts} | {shown.difference:.4f} | {shown.half_length:.4f} |"
