"""Learn a concept from a folder of images: ICO, Custom Diffusion, textual inversion."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.train_ico import main

if __name__ == "__main__":
    run(main)
