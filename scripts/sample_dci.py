"""Generate a learned concept in new places with DCI: divide, conquer, then integrate."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.sample_dci import main

if __name__ == "__main__":
    run(main)
