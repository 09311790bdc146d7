"""Ask a person about blind pairs of images, on a page of this machine."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.rate import main

if __name__ == "__main__":
    run(main)
