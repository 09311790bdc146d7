"""Train, sample and evaluate a grid of concepts, methods, seeds and sampling settings, on Slurm or on this machine.

python scripts/sweep.py --config configs/sweep/tiny.yaml cluster=local
python scripts/sweep.py --config configs/sweep/tiny.yaml cluster=slurm slurm.gpus_per_node=0
python scripts/sweep.py --config configs/sweep/tiny.yaml --status

What is done is not done again: the same command begins a sweep, goes on with it and completes it.
"""

import shlex
import sys

from common import Parser, run


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/sweep/tiny.yaml, configs/eval/*.yaml, or one of your own")
    parser.add_argument("--only", metavar="PATTERN", help="some cells: concept/method/seed/setting, * for any")
    parser.add_argument("--dry-run", action="store_true", help="show the jobs and the programs that they would run")
    parser.add_argument("--status", action="store_true", help="show the state of each cell")
    parser.add_argument("--no-wait", action="store_true", help="slurm: leave when the jobs are in the queue")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="options in place of the file's")
    return parser.parse_args()


def main() -> None:
    args = arguments()

    from dci.cells import check_recipes, chosen
    from dci.cluster import SLURM, SweepConfig, check, queued_trainings, run_local, submit_slurm, wait_slurm
    from dci.grid import cells
    from dci.suites import load_suite

    config = load_suite(args.config, args.overrides, SweepConfig)
    check(config)
    everything = cells(config)
    some = chosen(everything, args.only)
    check_recipes(some)
    todo = [cell for cell in some if not cell.result.is_file()]
    if args.dry_run:
        show_jobs(todo, len(some))
    elif args.status:
        show_states(some, queued_trainings(config))
    else:
        if config.cluster == SLURM:
            print(f"{submit_slurm(config, todo)} jobs submitted", flush=True)
            if args.no_wait:
                return
            wait_slurm(config, todo, say)
        else:
            run_local(config, todo, say)
        finish(config, everything, some)


def say(text: str) -> None:
    print(text, flush=True)


def show_jobs(todo: list, number: int) -> None:
    """Print each job, a training with its cells, as the commands that it would run."""
    from dci.grid import by_training

    groups = by_training(todo)
    for group in groups:
        training = group[0].training
        print(f"# {training.name}{' (trained)' if training.concept_file.is_file() else ''}")
        commands = [] if training.concept_file.is_file() else [training.command]
        commands += [command for cell in group for command in (cell.sampling, cell.evaluation)]
        print("\n".join(map(shlex.join, commands)))
    print(f"# {len(todo)} cells in {len(groups)} jobs; {number - len(todo)} of {number} cells are done")


def show_states(some: list, queued: set[str]) -> None:
    """Print a table of the cells, and the last line of the log of those that failed."""
    from dci.cells import STATES, last_words, state

    states = [state(cell, queued) for cell in some]
    width = max(len(cell.name) for cell in some)
    for cell, found in zip(some, states, strict=True):
        print(f"{cell.name:{width}}  {found:8}{last_words(cell) if found == 'failed' else ''}".rstrip())
    print(", ".join(f"{states.count(name)} {name}" for name in STATES if name in states))


def finish(config, everything: list, some: list) -> None:
    """Write the table and the report if all is there, or list what failed and leave with exit code 1."""
    from dci.cells import last_words
    from dci.grid import grid_folder
    from dci.results import write_grid_report, write_table

    done = [cell for cell in everything if cell.result.is_file()]
    failed = [cell for cell in some if not cell.result.is_file()]
    for cell in failed:
        print(f"failed: {cell.name}: {last_words(cell)}\n  log: {cell.log}", file=sys.stderr)
    if failed:
        print(f"failed: {len(failed)} of {len(some)} cells; the same command tries them again, with --only NAME one alone",
              file=sys.stderr)  # fmt: skip
    if done:
        folder = grid_folder(config)
        write_table(done, folder / "results.csv")
        page = write_grid_report(done, folder / "report", config.title)
        print(f"{len(done)} of {len(everything)} cells\nTable: {folder / 'results.csv'}\nReport: {page}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
