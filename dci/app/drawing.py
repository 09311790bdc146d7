"""One press of Draw: plain sampling and DCI from the same noise, step by step and side by side."""

import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from dci.app.shelf import Entry
from dci.app.stepwise import Steps, alternately
from dci.app.studio import Ready
from dci.app.wanted import Wanted
from dci.dual_branch.attention_maps import MapRecord
from dci.dual_branch.integration import fused_kernels
from dci.dual_branch.predictions import StepRecord
from dci.dual_branch.sampling import Observers
from dci.pipeline import Prepared
from dci.samples.image_metadata import prompt_metadata, sampling_metadata, with_concept
from dci.samples.plan import Plan
from dci.samples.writer import image_bytes
from ldm.diffusion import LatentDiffusion
from ldm.images import to_images
from ldm.runtime.decoding import decode
from ldm.sampling_loop import Callback

PLAIN, DCI = "plain", "dci"
PREVIEWS = 0.2
"""Share of the time that previews may take."""


@dataclass
class Side:
    """One of the two: its settings, and what is recorded while it is sampled."""

    name: str
    prepared: Prepared
    steps: StepRecord = field(default_factory=StepRecord)
    maps: MapRecord | None = None
    images: list[Image.Image] = field(default_factory=list)  # predictions until the last step, then the images
    files: list[bytes] = field(default_factory=list)  # PNG files of the finished images, with their parameters


@dataclass
class Drawing:
    """What the page keeps of one press of Draw."""

    wanted: Wanted
    sides: dict[str, Side]
    model: Callable[[], LatentDiffusion | None]  # a weak reference: another model may have taken its place
    finished: bool = False
    done: int = 0  # calls of the UNet, of both sides

    @property
    def calls(self) -> int:
        """How many there are."""
        return sum(len(side.prepared.timesteps) for side in self.sides.values())


def draw(ready: Ready, entry: Entry, wanted: Wanted, stopped: Callable[[], bool] = lambda: False) -> Iterator[Drawing]:
    """Sample both sides, and yield the drawing whenever there is something new to see; the last one is finished.

    Args:
        stopped: asked after each step; once it is true, nothing more is given.

    Raises:
        UserError: a prompt or an option that cannot be used.
    """
    drawing = _begin(ready, wanted)
    sides = list(drawing.sides.values())
    strands = [Steps(_sampler(side, wanted.n)) for side in sides]
    previews = _Previews(ready.pipeline.model)
    taking = alternately(*strands)
    try:
        yield drawing
        for number, _ in taking:
            if stopped():
                return
            drawing.done += 1
            if previews.due() and number == len(sides) - 1:
                for side in sides:
                    side.images = previews.of(side.steps)
                yield drawing
    finally:
        taking.close()
    for side, strand in zip(sides, strands, strict=True):
        side.images = to_images(strand.result)
        side.files = _files(side, ready, entry)
    drawing.finished = True
    yield drawing


def _begin(ready: Ready, wanted: Wanted) -> Drawing:
    model = ready.pipeline.model
    sides = {name: Side(name, ready.pipeline.prepare(wanted.request(name == DCI))) for name in (PLAIN, DCI)}
    sides[DCI].maps = MapRecord()
    return Drawing(wanted, sides, weakref.ref(model))


def _sampler(side: Side, n: int) -> Callable[[Callback], Any]:
    """Return what samples a side's images, the same numbers and the same batch as the command's."""

    def sample(tell: Callback) -> Any:
        def callback(step: dict[str, Any]) -> None:
            side.steps.record(step)
            tell(step)

        maps = side.maps.record if side.maps is not None and side.prepared.dual_steps else None
        seed = side.prepared.options.seed
        return side.prepared.sample([0] * n, list(range(n)), [seed] * n, Observers(callback, maps))

    return sample


def _files(side: Side, ready: Ready, entry: Entry) -> list[bytes]:
    """Return the PNG files that the command for a side writes."""
    prepared, options, request = side.prepared, side.prepared.options, side.prepared.request
    metadata = sampling_metadata(ready.loaded, prepared)
    metadata = with_concept(metadata, prepared, [entry.path], class_noun=entry.class_noun, trigger=entry.trigger)
    plan = Plan(prompt_metadata(prepared), metadata, [options.seed], request.n, request.batch_size)
    return [image_bytes(plan, number, image) for number, image in enumerate(side.images)]


def watched_alike(ready: Ready) -> bool:
    """Whether recording the branch weights leaves the images exactly as they are without it."""
    return fused_kernels(ready.pipeline.model.device) is None


class _Previews:
    """Decodes the branches' predictions of the images, as often as a small share of the time allows."""

    def __init__(self, model: LatentDiffusion):
        self.model, self.began, self.spent, self.last = model, time.monotonic(), 0.0, 0.0

    def due(self) -> bool:
        """Whether it is time for new ones."""
        now = time.monotonic()
        return now - self.last > 0.15 and self.spent <= PREVIEWS * (now - self.began)

    @torch.inference_mode()
    def of(self, record: StepRecord) -> list[Image.Image]:
        """Return the concept branch's predictions of the last step."""
        before = time.monotonic()
        latents = record.predicted[-1][0].to(self.model.device)
        images = to_images(decode(self.model, latents))
        self.last = time.monotonic()
        self.spent += self.last - before
        return images


class Drawings:
    """The last drawings of all clients, by keys that nobody can guess; the oldest is forgotten first."""

    def __init__(self, most: int = 12):
        self._most, self._kept, self._lock = most, OrderedDict[str, Drawing](), threading.Lock()

    def keep(self, drawing: Drawing, instead_of: str | None = None) -> str:
        """Keep a drawing, and return its key.

        Args:
            instead_of: the client's one before, which is forgotten.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._kept.pop(instead_of or "", None)
            self._kept[key] = drawing
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return key

    def get(self, key: str | None) -> Drawing | None:
        """Return a drawing, None if it has been forgotten."""
        return self._kept.get(key or "")

    def __len__(self) -> int:
        return len(self._kept)
