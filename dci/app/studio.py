"""The model that the page samples with: loaded once, with one concept at a time applied to it."""

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dci.concept.concept_file import Concept
from dci.concept.foreign.importing import import_concept, is_foreign
from dci.concept.loras import add_trained_loras
from dci.concept.trained_on import TrainedOn
from dci.pipeline import Pipeline
from dci.samples.image_metadata import LoadedModel, precision_name
from ldm.checkpoint import fingerprint, load_model, model_config
from ldm.diffusion import LatentDiffusion
from ldm.runtime.acceleration import accelerate, fastest_precision
from ldm.shipped import ROOT, find

TINY = ROOT / "configs/model/tiny.yaml"


@dataclass(frozen=True)
class Weights:
    """Which base model to load; None leaves it to the concept, as the programs do."""

    model: str | None = None
    checkpoint: str | None = None
    vae: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Ready:
    """A concept on its base model, and what identifies that model in the images' metadata."""

    concept: Concept
    pipeline: Pipeline
    loaded: LoadedModel


class Studio:
    """Holds one base model, and puts concepts on it and off again; the page's queue lets one client sample at a time."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self._lock = threading.RLock()
        self._base: tuple[LatentDiffusion, LoadedModel] | None = None
        self._place: tuple = ()
        self._applied: tuple[str, Ready, Callable[[], None]] | None = None  # key of the concept, and how it is undone

    def base(self, concept: Concept | None = None) -> tuple[LatentDiffusion, LoadedModel]:
        """Return the base model, with a concept on it or not, loaded anew where it is another one.

        Args:
            concept: that it is for; None: whatever is loaded will do.
        """
        with self._lock:
            if concept is None and self._base is not None:
                return self._base
            trained, asked = concept.trained_on if concept else TrainedOn(), self.weights
            if asked.model:
                model, checkpoint = asked.model, asked.checkpoint
            else:
                model, checkpoint = trained.base(asked.checkpoint, str(TINY))
            own = not asked.model and model == trained.model
            vae = asked.vae or (trained.own_vae() if own else None)
            place = _place(model, checkpoint, vae, trained.loras)
            if self._base is None or self._place != place:
                self._base = self._applied = None  # before the next one takes its memory
                self._base = self._load(model, checkpoint, vae, concept)
                self._place = place
            # The same file may have another name, which the images' metadata record as it was given.
            known = dataclasses.replace(self._base[1], model=model, checkpoint=checkpoint, vae=vae)
            self._base = self._base[0], known
            return self._base

    def use(self, key: str, concept: Concept) -> Ready:
        """Return a concept on its base model; the one before is taken off.

        Args:
            key: identifies the concept's content, such as a hash.

        Raises:
            UserError: the concept's base model is not there, or another one.
        """
        with self._lock:
            model, loaded = self.base(concept)
            if self._applied is not None and self._applied[0] == key:
                return self._applied[1]
            self._take_off()
            replaced = concept.replaced(model)
            undo = concept.apply(model)
            ready = Ready(concept, Pipeline(model, concept, replaced), loaded)
            self._applied = (key, ready, undo)
            return ready

    def read(self, file: Path, class_noun: str | None = None, trigger: str | None = None) -> Concept:
        """Read a concept file, ours or another program's.

        Raises:
            UserError: it cannot be used.
        """
        if not is_foreign(file):
            return Concept.load(file)
        asked = self.weights
        model, checkpoint = (asked.model, asked.checkpoint) if asked.model else TrainedOn().base(asked.checkpoint, str(TINY))
        load = partial(load_model, model, checkpoint, dtype=None)
        return import_concept([file], class_noun, trigger, model_config(model), load, identify=False).concept

    def _take_off(self) -> None:
        if self._applied is not None:
            self._applied[2]()
            self._applied = None

    def _load(
        self, model: str, checkpoint: str | None, vae: str | None, concept: Concept | None
    ) -> tuple[LatentDiffusion, LoadedModel]:
        device = self.weights.device
        loaded = load_model(model, checkpoint, dtype=partial(fastest_precision, device=device), vae=vae)
        accelerate(loaded, device)
        if concept is not None:
            add_trained_loras(loaded, concept)
        known = LoadedModel(model, checkpoint, fingerprint(loaded), precision_name(loaded.dtype), vae=vae)
        return loaded.to(device), known


def _place(model: str, checkpoint: str | None, vae: str | None, loras: tuple[str, ...]) -> tuple:
    """What identifies the base model, whatever its files are called."""
    given = (find(name) if name else None for name in (model, checkpoint, vae))
    return *(str(path.resolve()) if path and path.exists() else str(path) for path in given), *loras
