"""Write a concept for the programs that images are made with."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.export_concept import main

if __name__ == "__main__":
    run(main)
