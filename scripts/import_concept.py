"""Make a concept file of files from other programs."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.import_concept import main

if __name__ == "__main__":
    run(main)
