"""Personalised image generation by ICO and DCI (Jin et al., ECCV 2024).

From a concept file to PIL images:

    from dci import Pipeline

    pipeline = Pipeline.load("logs/RUN/concept.safetensors")
    for i, image in enumerate(pipeline("a V* cat on the beach", n=4, seed=0, agg_lambda=0.5)):
        image.save(f"beach-{i}.png")

`Pipeline` and what it needs, PyTorch above all, are imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dci.version import __version__

if TYPE_CHECKING:
    from dci.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        return import_module("dci.pipeline").Pipeline
    raise AttributeError(f"module 'dci' has no attribute '{name}'")
