"""Train, sample and score a grid of concepts, methods, seeds and settings, here or on Slurm, and report what compares them.

python scripts/sweep.py --config configs/eval/tiny.yaml --dry-run
python scripts/sweep.py --config configs/eval/tiny.yaml
python scripts/sweep.py --config configs/sweep/tiny.yaml cluster=slurm slurm.gpus_per_node=0
python scripts/sweep.py --config configs/sweep/tiny.yaml --status
python scripts/sweep.py --config configs/eval/tiny-choice.yaml --choose

What is done is not done again: the same command begins a grid, goes on with it and completes it. compare.py is
the same program.
"""

import sys
import warnings
from pathlib import Path

from dci.cli.arguments import Parser, above_zero
from dci.files import check_folder
from ldm.errors import Note, UserError


def arguments():
    """Parse the grid's file, its overrides and what to do with it."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a file of configs/eval/ or configs/sweep/, or one of your own")
    only = "some cells: concept/method/seed/setting, * for any; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=only)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--dry-run", action="store_true", help="show the jobs, the number of images and an estimate")
    shown.add_argument("--status", action="store_true", help="show the state of each cell")
    parser.add_argument(
        "--tflops",
        type=above_zero,
        metavar="RATE",
        help="with --dry-run: estimate for GPUs of this dense bf16 rate (A100 312, H100 798), not for this machine",
    )
    parser.add_argument("--no-wait", action="store_true", help="slurm: leave when the jobs are in the queue")
    parser.add_argument("--choose", action="store_true", help="find which variant of each method is best")
    parser.add_argument("--report", help="folder of the report (default: report/ in the grid's folder)")
    parser.add_argument("--ratings", metavar="CSV", help="for the report: its images.csv with further columns of numbers")
    parser.add_argument("--answers", metavar="CSV", help="for the report: what people answered, as dci rate writes it")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as workers=2 n_samples=4")
    return parser.parse_args()


def main() -> None:
    """List, show, submit or run what is left of the grid, and report on what is done."""
    args = arguments()

    from dci.experiments.grid import grid_points
    from dci.experiments.launchers import queued_trainings, submit_slurm
    from dci.experiments.runner import check_recipes, chosen
    from dci.experiments.suite import SLURM, load_suite

    suite = load_suite(args.config, args.overrides)
    everything = grid_points(suite)
    some = chosen(everything, args.only)
    check_recipes(some)
    todo = unfinished(some)
    if args.tflops and not args.dry_run:
        warnings.warn("--tflops has no effect without --dry-run", Note, stacklevel=1)
    if args.no_wait and suite.cluster != SLURM:
        warnings.warn("--no-wait has no effect without cluster=slurm", Note, stacklevel=1)
    if args.dry_run:
        estimate = estimated(suite, some, args.tflops)
        show_jobs(todo, len(some))
        print(estimate)
    elif args.status:
        show_states(some, queued_trainings(suite))
    elif args.no_wait and suite.cluster == SLURM:
        if args.choose:
            raise UserError("--choose needs the cells' results: leave --no-wait out")
        print(f"{submit_slurm(suite, todo)} jobs submitted", flush=True)
    else:
        check_ready(suite, todo, args)
        if args.choose:
            some = work_on_choices(suite, some)
        else:
            work(suite, some)
        finish(suite, everything, some, args)
        if args.choose:
            show_choices(suite, some, args.report)


def check_ready(suite, todo: list, args) -> None:
    """Raise UserError or OSError for what would only show after the first training, or once in each cell's process."""
    from dci.evaluation.answers import read_answers
    from dci.evaluation.ratings import read_ratings
    from dci.experiments.grid import grid_folder
    from dci.experiments.suite import SLURM
    from ldm.runtime.acceleration import check_device

    if todo and suite.cluster != SLURM:
        check_device(suite.device)
    if args.ratings:
        read_ratings(args.ratings)
    if args.answers:
        read_answers(args.answers)
    if args.report:
        check_folder(args.report, "--report")
    check_folder(grid_folder(suite), "the grid's folder")


def show_jobs(todo: list, total: int) -> None:
    """Print each job: a training with its cells."""
    from dci.experiments.grid import by_training
    from dci.experiments.sampling import SamplingConfig

    groups = by_training(todo)
    for group in groups:
        training = group[0].training
        done = training.concept_file.is_file()
        print(f"# {training.name}{' (trained)' if done else ''}")
        if not done:
            print(f"train {training.task.config} {' '.join(training.task.options)}")
        for point in group:
            options = {**vars(SamplingConfig()), "seed": None, "n_samples": None}
            given = [f"{name}={value}" for name, value in vars(point.task.sampling).items() if value != options[name]]
            print(f"sample {point.task.prompts} {' '.join(given)}")
    print(f"# {len(todo)} cells in {len(groups)} jobs; {total - len(todo)} of {total} cells are done")


def estimated(suite, points: list, tflops: float | None = None) -> str:
    """Return what is to be made, and an estimate of its time; or why there is none.

    Args:
        tflops: of a GPU that is not here; None: this machine's device is measured.
    """
    from dci.experiments import cost
    from dci.experiments.suite import SLURM
    from ldm.runtime.acceleration import pick_device

    try:
        device = "cuda" if tflops else pick_device(suite.device)
    except UserError as error:
        if suite.cluster == SLURM:  # the jobs run elsewhere
            return f"no estimate: {error}, or --tflops RATE of the jobs' GPUs"
        raise
    rate = tflops * 1e12 if tflops else cost.matrix_rate(device, threads=suite.threads)
    try:
        return cost.describe(cost.estimate(points, device, rate), device, rate, suite.workers or 1, given=bool(tflops))
    except UserError as error:
        return str(error)


def show_states(some: list, queued: set[str]) -> None:
    """Print a table of the cells, and the last line of the log of those that failed."""
    from dci.experiments.runner import STATES, last_words, state

    states = [state(point, queued) for point in some]
    width = max(len(point.name) for point in some)
    for point, found in zip(some, states, strict=True):
        print(f"{point.name:{width}}  {found:8}{last_words(point) if found == 'failed' else ''}".rstrip())
    print(", ".join(f"{states.count(name)} {name}" for name in STATES if name in states))


def work(suite, points: list) -> None:
    """Let the launcher work through the cells, and print each one's state when it has come to an end."""
    from tqdm import tqdm

    from dci.experiments.launchers import launch, submit_slurm
    from dci.experiments.runner import state
    from dci.experiments.suite import SLURM

    todo = unfinished(points)
    if suite.cluster == SLURM:
        print(f"{submit_slurm(suite, todo)} jobs submitted", flush=True)
    with tqdm(total=len(points), initial=len(points) - len(todo), desc=suite.name, unit="cell") as bar:

        def report(point) -> None:
            print(f"{state(point):8} {point.name}", flush=True)
            bar.update()

        launch(suite, todo, report)


def work_on_choices(suite, some: list) -> list:
    """Work through the cells that a choice needs: plain sampling of all variants, DCI with the chosen ones.

    Returns:
        These cells; where some failed, those with plain sampling alone.
    """
    from dci.experiments import choice
    from dci.experiments.aggregate import pooled_runs

    plain = [point for point in some if point.sampling.get("no_dci")]
    work(suite, plain)
    if unfinished(plain):
        return plain
    trainings = choice.choose_trainings(pooled_runs(plain), suite.methods).values()
    both = [point for point in some if not point.sampling.get("no_dci") and point.method in trainings]
    work(suite, both)
    return plain + both


def unfinished(points: list) -> list:
    """Return the cells that have no result yet."""
    return [point for point in points if not point.result.is_file()]


def finish(suite, everything: list, some: list, args) -> None:
    """Write the table and the report of what is done; list what failed, and leave with exit code 1 then."""
    from dci.experiments.aggregate import write_grid_report, write_table
    from dci.experiments.grid import grid_folder
    from dci.experiments.runner import last_words

    done = [point for point in everything if point.result.is_file()]
    failed = unfinished(some)
    for point in failed:
        print(f"failed: {point.name}: {last_words(point)}\n  log: {point.log}", file=sys.stderr)
    if failed:
        print(
            f"failed: {len(failed)} of {len(some)} cells; the same command tries them again, with --only NAME one alone",
            file=sys.stderr,
        )
    if done:
        folder = grid_folder(suite)
        write_table(done, folder / "results.csv")
        outdir = Path(args.report or folder / "report")
        page = write_grid_report(done, outdir, suite.title, suite.notes, args.ratings, args.answers)
        print(f"{len(done)} of {len(everything)} cells\nTable: {folder / 'results.csv'}\nReport: {page}")
    if failed:
        sys.exit(1)


def show_choices(suite, points: list, report: str | None) -> None:
    """Print the line of a suite for each method, with what was chosen for it; write chosen.json beside the report."""
    from dci.experiments import choice
    from dci.experiments.aggregate import pooled_runs
    from dci.experiments.grid import grid_folder
    from dci.files import write_atomically
    from ldm.shipped import ROOT

    chosen = choice.choose(pooled_runs(points), suite.methods)
    configs = {method.family: Path(method.config) for method in suite.methods}
    print(f"Chosen by {choice.RULE}:")
    for one in chosen:
        file = configs[one.method]
        print(one.entry(str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)))
    file = Path(report or grid_folder(suite) / "report") / "chosen.json"
    write_atomically(file, choice.as_file(chosen))
    print(f"Choices: {file}")
