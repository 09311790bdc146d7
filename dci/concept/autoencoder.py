"""The autoencoder that a concept was trained with, where that was not its model's own."""

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.shipped import find


def trained_vae(config: Mapping[str, Any]) -> str | None:
    """Return the autoencoder's file or folder that training had in place of the model's own; None: it had none.

    Args:
        config: a concept's training configuration.

    Raises:
        UserError: it is not there any more.
    """
    vae = config.get("vae")
    if vae is not None and not find(vae).exists():
        raise UserError(
            f"the autoencoder {vae} that this concept was trained with is not there: "
            "name it as vae=, or name the model as model="
        )
    return vae
