"""The base model that a concept was trained on, as far as its file leads there."""

from collections.abc import Mapping
from typing import Any

from ldm.formats.hub import is_hub_id
from ldm.shipped import find


def trained_base(config: Mapping[str, Any], checkpoint: str | None, embedded: str) -> tuple[str, str | None]:
    """Return the model and the checkpoint to load for a concept where no model is asked for.

    Args:
        config: the concept's training configuration.
        checkpoint: weights that are asked for in place of the model's own; by themselves they tell their architecture.
        embedded: the model where neither leads anywhere.
    """
    own = config.get("model")
    if isinstance(own, str) and (find(own).exists() or is_hub_id(own)):
        return own, checkpoint or config.get("checkpoint")
    return (checkpoint, None) if checkpoint else (embedded, None)
