"""Measure fidelity and editability of generated images: CLIP-T, CLIP-I, DINO-I, KID, with intervals, and make a report."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.evaluate import main

if __name__ == "__main__":
    run(main)
