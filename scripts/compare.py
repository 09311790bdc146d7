"""Train and sample a grid of methods, concepts, prompts, seeds and DCI settings, score it, and draw the trade-off.

python scripts/compare.py --config configs/eval/tiny.yaml --dry-run
python scripts/compare.py --config configs/eval/tiny.yaml

Repeating the command goes on where it stopped; what is done is not done again.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Parser, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/eval/<suite>.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the number of pictures and an estimate")
    parser.add_argument("--report", help="folder of the report (default: report/ in the suite's folder)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as workers=2 n_samples=4")
    args = parser.parse_args()

    from dci.cells import check_recipes
    from dci.grid import cells, grid_folder
    from dci.suites import load_suite

    suite = load_suite(args.config, args.overrides)
    plan = cells(suite)
    if args.dry_run:
        print(describe_plan(suite, plan))
        return
    check_recipes(plan)
    failures = work(suite, plan)
    if failures:
        print("\n".join(f"failed: {name}: {why}" for name, why in failures.items()), file=sys.stderr)
        sys.exit(1)
    print(f"Report: {report(suite, plan, Path(args.report or grid_folder(suite) / 'report'))}")


def describe_plan(suite, plan: list) -> str:
    """Return the cells and an estimate of their time."""
    from common import pick_device

    from dci import estimate

    device = pick_device(suite.device)
    rate = estimate.matrix_rate(device, threads=suite.threads)
    lines = [f"{len(plan)} cells: concepts ({len(suite.concepts)}) x methods x seeds x settings"]
    lines += [f"  {cell.name}{' (done)' if cell.result.is_file() else ''}" for cell in plan]
    lines.append(estimate.describe(estimate.estimate(plan, device, rate), device, rate, suite.workers))
    return "\n".join(lines)


def work(suite, plan: list) -> dict[str, str]:
    """Work through the cells, so many trainings at a time; return why cells failed, by their names."""
    from tqdm import tqdm

    from dci.cells import Worker
    from dci.grid import by_training

    failures: dict[str, str] = {}
    done = sum(cell.result.is_file() for cell in plan)
    with ThreadPoolExecutor(suite.workers) as pool, tqdm(total=len(plan), initial=done, desc=suite.name, unit="cell") as bar:

        def work_on(group: list) -> None:
            worker = Worker(suite.threads)
            for cell in [cell for cell in group if not cell.result.is_file()]:
                failures.update(worker.work([cell]))
                bar.update()

        list(pool.map(work_on, by_training(plan)))
    return failures


def report(suite, plan: list, outdir: Path) -> Path:
    """Write the tables, the plane, the verdicts and a sheet of each concept; return the page."""
    from dci import comparison
    from dci.plots import fidelity_editability_plane
    from dci.report import write_report
    from dci.results import pooled_runs

    runs = pooled_runs(plan)
    notes = [*suite.notes, *comparison.verdicts(runs)]
    outdir.mkdir(parents=True, exist_ok=True)
    for concept in suite.concepts:
        chosen = [cell for cell in plan if cell.concept == concept.name and cell.seed == suite.seeds[0]]
        comparison.sheet(chosen).save(outdir / f"sheet-{concept.name}.webp", quality=90)
    fidelity_editability_plane(runs).savefig(outdir / "plane.png", dpi=120)
    figures = []
    for method, curves in comparison.setting_curves(runs).items():
        curves.savefig(outdir / f"curves-{method}.png", dpi=120)
        figures.append((f"{method}: one setting changed at a time, less plain sampling of the same noise", curves))
    return write_report(outdir, runs, suite.title, notes, figures)


if __name__ == "__main__":
    run(main)
