"""The package's extras: dependencies that sampling does without are installed on request."""

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
    if package not in EXTRAS:
        return None
    extra = EXTRAS[package]
    return f"this needs the package {package}, which the extra '{extra}' installs: pip install 'dci[{extra}]'"
