"""sweep.py by its name for evaluation suites: a grid is trained, sampled, scored and reported."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.sweep import main

if __name__ == "__main__":
    run(main)
