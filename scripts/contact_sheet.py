"""Put the images of a folder into one sheet."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.contact_sheet import main

if __name__ == "__main__":
    run(main)
