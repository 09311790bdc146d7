"""Show what DCI does on a page: draw, look inside, learn a concept, compare settings."""

import clone  # noqa: F401

from dci.cli.app import main
from dci.cli.arguments import run

if __name__ == "__main__":
    run(main)
