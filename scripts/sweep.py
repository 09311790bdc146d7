"""Train, sample and evaluate a grid of concepts, methods, seeds and sampling settings, on Slurm or on this machine."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.sweep import main

if __name__ == "__main__":
    run(main)
