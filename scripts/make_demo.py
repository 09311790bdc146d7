"""Make the demo concepts of data/demo: learn them from data/concepts, and take this machine's paths out of the files.

python scripts/make_demo.py
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, run

CONCEPTS = {"cake": "cake", "cottage": "house", "lorry": "truck"}
"""Folder of data/concepts -> class noun: of the held-out drawings, those that came out best to the eye."""


def main() -> None:
    """Train each demo concept unless a finished run is there, and copy it to data/demo."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", default="logs/demo", help="where the runs are made; finished ones are taken as they are")
    args = parser.parse_args()

    from ldm.shipped import ROOT

    for name, noun in CONCEPTS.items():
        folder = _finished(Path(args.logdir), name)
        if folder is None:
            _learn(name, noun, args.logdir)
            folder = _finished(Path(args.logdir), name)
        _ship(folder / "concept.safetensors", ROOT / f"data/demo/{name}.safetensors", ROOT)


def _learn(name: str, noun: str, logdir: str) -> None:
    options = [f"data.images=data/concepts/{name}", f"concept.class_noun={noun}", "validation.every=0"]
    train = [sys.executable, "scripts/train_ico.py", "--config", "configs/train/ico-tiny.yaml"]
    subprocess.run([*train, "--name", f"demo-{name}", "--logdir", logdir, *options], check=True)


def _finished(logdir: Path, name: str) -> Path | None:
    return max((file.parent for file in logdir.glob(f"*_demo-{name}/concept.safetensors")), default=None)


def _ship(source: Path, target: Path, root: Path) -> None:
    from dci.concept.concept_file import Concept
    from dci.finetuning.config_files import map_paths

    concept = Concept.load(source)
    map_paths(concept.config, lambda key, value: str(Path(value).relative_to(root)) if Path(value).is_absolute() else value)
    dataclasses.replace(concept).save(target)
    print(f"{target.relative_to(root)}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
