"""Plot how much the runs of reports differ from one of them in fidelity and editability, with paired intervals.

python scripts/plot_differences.py docs/results-tiny docs/results-tiny/noto --out thirty.png
python scripts/plot_differences.py docs/results-tiny docs/results-tiny/other-methods --out methods.png
"""

import clone  # noqa: F401

from dci.cli.arguments import Parser, image_file, run


def main() -> None:
    """Pool the reports, and plot the rows that are of all their concepts."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "reports", nargs="+", help="folders of reports, or their scores.json; the same row of several is one"
    )
    parser.add_argument("--less", default="custom-diffusion, plain", help="the row at the origin (default '%(default)s')")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to plot (default: those of all concepts)")
    parser.add_argument("--out", type=image_file, required=True, help="the plot's file")
    args = parser.parse_args()

    from dci.evaluation.difference_plane import difference_plane
    from dci.evaluation.scores import read_reports
    from ldm.errors import UserError

    runs = read_reports(args.reports)
    concepts = {name: {row.concept for row in scores.rows} for name, scores in runs.items()}
    everything = set().union(*concepts.values())
    if unknown := [name for name in args.rows or [] if name not in runs]:
        raise UserError(f"no row '{unknown[0]}': expected some of {'; '.join(runs)}")
    rows = args.rows or [name for name in runs if concepts[name] == everything]
    if left_out := [name for name in runs if name not in rows and not args.rows]:
        print(f"Left out, for they are not of all {len(everything)} concepts: {'; '.join(left_out)}")
    figure = difference_plane({name: runs[name] for name in dict.fromkeys([args.less, *rows]) if name in runs}, args.less)
    figure.savefig(args.out, dpi=120)
    print(f"Plot: {args.out}")


if __name__ == "__main__":
    run(main)
