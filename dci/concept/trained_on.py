"""What a concept was trained on, as its file records it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError
from ldm.formats.hub import is_hub_id
from ldm.shipped import find


@dataclass(frozen=True)
class TrainedOn:
    """The base model, what was put on it or in its place, and the images; None and () where there was nothing of it."""

    model: str | None = None  # YAML, weights' file, diffusers folder or hub id
    checkpoint: str | None = None  # weights in place of the model's own
    vae: str | None = None  # an autoencoder's file or folder in place of the model's own
    loras: tuple[str, ...] = ()  # FILE or FILE:0.8
    images: tuple[str, ...] = ()  # the folder of each concept

    @staticmethod
    def of(config: Mapping[str, Any]) -> "TrainedOn":
        """Read a training configuration, which may be another program's: values that are no texts are ignored."""
        single = {name: text for name in ("model", "checkpoint", "vae") for text in _texts([config.get(name)])}
        subjects = config.get("concepts") or [config.get("data")]
        folders = [subject.get("images") for subject in subjects if isinstance(subject, dict)]
        return TrainedOn(**single, loras=_texts(config.get("loras")), images=_texts(folders))

    def base(self, checkpoint: str | None, embedded: str) -> tuple[str, str | None]:
        """Return the model and the checkpoint to load for a concept where no model is asked for.

        Args:
            checkpoint: weights that are asked for in place of the model's own; without a model they give the architecture.
            embedded: the model where neither leads anywhere.
        """
        if self.model and self.is_there:
            return self.model, checkpoint or self.checkpoint
        return (checkpoint, None) if checkpoint else (embedded, None)

    @property
    def is_there(self) -> bool:
        """Whether the model is on this machine, or on a hub."""
        return self.model is not None and (find(self.model).exists() or is_hub_id(self.model))

    def own_vae(self) -> str | None:
        """Return the autoencoder that training had in place of the model's own; None: it had none.

        Raises:
            UserError: it is not there any more.
        """
        if self.vae is not None and not find(self.vae).exists():
            raise UserError(
                f"the autoencoder {self.vae} that this concept was trained with is not there: "
                "name it as vae=, or name the model as model="
            )
        return self.vae


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str) and value) if isinstance(values, (list, tuple)) else ()
