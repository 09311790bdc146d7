"""The package's extras: dependencies that sampling does without are installed on request."""

import importlib.util

from ldm.shipped import IS_CLONE, ROOT

EXTRAS = {
    "pytorch_lightning": "train",
    "tensorboard": "train",
    "jinja2": "eval",
    "timm": "eval",
    "transformers": "eval",
    "torch_fidelity": "eval",
    "submitit": "cluster",
    "gradio": "app",
    "diffusers": "diffusers",
}
"""Package -> the extra that installs it."""


def describe(error: ModuleNotFoundError) -> str | None:
    """Return how to install the package that an import lacks, in one line; None for packages of no extra."""
    package = (error.name or "").partition(".")[0]
    return how_to_install(package) if package in EXTRAS else None


def how_to_install(package: str) -> str:
    """Return how to install a package of an extra, in one line."""
    extra = EXTRAS[package]
    # Of a clone that is not installed, pip would look up the name on the index, where it may be anybody's.
    install = f"pip install '.[{extra}]' in {ROOT}" if IS_CLONE else f"pip install 'dci[{extra}]'"
    return f"this needs the package {package}, which the extra '{extra}' installs: {install}"


def is_missing(package: str) -> bool:
    """Whether a package is not installed; it is not imported."""
    return importlib.util.find_spec(package) is None
