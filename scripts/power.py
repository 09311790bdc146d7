"""Say which difference between two runs a comparison over so many concepts can show."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.power import main

if __name__ == "__main__":
    run(main)
