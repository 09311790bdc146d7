"""Merge separately trained concepts into one file, in closed form (Custom Diffusion's constrained least squares)."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.merge_concepts import main

if __name__ == "__main__":
    run(main)
