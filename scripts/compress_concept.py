"""Make a concept file small: the change of each weight as a product of two thin matrices (SVD)."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.compress_concept import main

if __name__ == "__main__":
    run(main)
