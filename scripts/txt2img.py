"""Generate images with the base model alone: of a prompt, from an image, or into an image."""

import clone  # noqa: F401

from dci.cli.arguments import run
from dci.cli.txt2img import main

if __name__ == "__main__":
    run(main)
