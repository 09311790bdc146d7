"""Personalised image generation by ICO and DCI.

dci train --config configs/train/ico-tiny.yaml     # learn the demo concept; prints the command that samples it
"""

import importlib
import sys
from typing import NamedTuple

from dci.version import __version__


class Program(NamedTuple):
    """A program behind a verb of `dci`: a module whose `main` reads its arguments by a `Parser`."""

    module: str
    summary: str


PROGRAMS = {
    "train": Program("dci.cli.train_ico", "learn a concept from a folder of images"),
    "sample": Program("dci.cli.sample_dci", "generate images of a learned concept with DCI"),
    "txt2img": Program("dci.cli.txt2img", "generate images with the base model alone"),
    "evaluate": Program("dci.cli.evaluate", "score generated images: CLIP-T, CLIP-I, DINO-I, KID, with a report"),
    "compare": Program("dci.cli.sweep", "run a grid or suite of methods, concepts and settings, and report it"),
    "sweep": Program("dci.cli.sweep", "the same; on this machine or on Slurm"),
    "rate": Program("dci.cli.rate", "ask a person about blind pairs of images"),
    "power": Program("dci.cli.power", "say which difference so many concepts can show"),
    "merge": Program("dci.cli.merge_concepts", "merge separately trained concepts into one file"),
    "compress": Program("dci.cli.compress_concept", "make a concept file small"),
    "inspect": Program("dci.cli.inspect_concept", "show what a concept file has learned"),
    "export": Program("dci.cli.export_concept", "write a concept in the formats of other programs"),
    "import": Program("dci.cli.import_concept", "make a concept file of the files of other programs"),
    "app": Program("dci.cli.app", "a page to draw, look inside, learn and compare on"),
    "sheet": Program("dci.cli.contact_sheet", "put the images of a folder into one sheet"),
}
"""Verb -> program, in the order of `dci --help`. A new program needs an entry here and nothing else."""


def main() -> None:
    """Run the program that the first argument names; without one, list them."""
    from dci.cli.arguments import run

    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(overview())
    elif verb == "--version":
        print(f"dci {__version__}")
    elif verb not in PROGRAMS:
        sys.exit(unknown(verb))
    else:
        run(importlib.import_module(PROGRAMS[verb].module).main, verb)


def overview() -> str:
    """Return the help: one line for each program."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {verb:{width}}  {program.summary}" for verb, program in PROGRAMS.items()]
    title = (__doc__ or "").splitlines()[0]
    return "\n".join(
        ["usage: dci PROGRAM [OPTIONS]", "", title, "", *lines, "", "dci PROGRAM --help lists a program's options."]
    )


def unknown(verb: str) -> int:
    """Print one line about a program that there is not; return the exit code."""
    from ldm.texts import nearest

    near = nearest(verb, PROGRAMS)
    hint = f"; did you mean 'dci {near}'?" if near else ""
    print(f"error: no program '{verb}'{hint} (see dci --help)", file=sys.stderr)
    return 2
