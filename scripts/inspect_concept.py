"""Show what a concept has learned: its tokens, their nearest words, and how far each layer has moved."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.inspect_concept import main

if __name__ == "__main__":
    run(main)
