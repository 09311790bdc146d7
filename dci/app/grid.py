"""T_a x lambda: the same noise under many settings, as a sheet and on the fidelity-editability plane."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dci.app.stepwise import Steps
from dci.app.studio import Ready
from dci.app.wanted import Wanted
from dci.concept.prompts import parse_prompt
from dci.concept.trained_on import TrainedOn
from dci.dual_branch.sampling import Observers
from dci.evaluation.encoders import TINY, Encoder, load_encoder
from dci.evaluation.metrics import CLIP_T, DINO_I, image_scores, text_scores
from dci.evaluation.plots import fidelity_editability_plane, inline_svg
from dci.evaluation.scores import ImageScore, RunScores, Scores, summarize
from dci.pipeline import Prepared
from ldm.errors import UserError
from ldm.images import captioned_grid, list_images, read_image, to_images
from ldm.sampling_loop import Callback
from ldm.shipped import find

MOST_VALUES = 5  # on an axis


@dataclass
class Grid:
    """The images of a grid, as far as they are made."""

    times: list[float]
    lambdas: list[float]
    plain: Image.Image | None = None
    images: dict[tuple[float, float], Image.Image] = field(default_factory=dict)  # (T_a, lambda) -> image
    done: int = 0  # calls of the UNet
    calls: int = 1

    @property
    def finished(self) -> bool:
        """Whether all images are there."""
        return self.plain is not None and len(self.images) == len(self.times) * len(self.lambdas)

    def plain_image(self) -> Image.Image:
        """Return the image of plain sampling.

        Raises:
            ValueError: it is not made yet.
        """
        if self.plain is None:
            raise ValueError("plain sampling has no image yet: take more of the grid's steps")
        return self.plain

    def sheet(self) -> Image.Image:
        """Return one image of all: a row for each T_a, a column for each lambda, plain sampling in a row of its own."""
        plain = self.plain_image()
        width, height = plain.size
        blank = Image.new("RGB", (width, height), "white")
        cells = [plain, *[blank] * (len(self.lambdas) - 1)]
        captions = ["plain", *[""] * (len(self.lambdas) - 1)]
        for time in self.times:
            cells += [self.images[time, value] for value in self.lambdas]
            captions += [f"T_a {time:g}, lambda {value:g}" for value in self.lambdas]
        return captioned_grid(cells, captions, len(self.lambdas), max(1, 128 // width))


def values(text: str, name: str, low: float, high: float) -> list[float]:
    """Parse "0.1, 0.3" -> [0.1, 0.3], rising and without repeats.

    Raises:
        UserError: no numbers, too many, or one out of range.
    """
    try:
        found = sorted({float(part) for part in str(text).replace(";", ",").split(",") if part.strip()})
    except ValueError as error:
        raise UserError(f"{name} '{text}': expected numbers with commas between them, such as 0.1, 0.3") from error
    if not 1 <= len(found) <= MOST_VALUES:
        raise UserError(f"{name} has {len(found)} values: expected 1 to {MOST_VALUES}")
    if not all(low <= value <= high for value in found):
        raise UserError(f"{name} '{text}': expected values from {low:g} to {high:g}")
    return found


def sample_grid(
    ready: Ready, wanted: Wanted, times: list[float], lambdas: list[float], stopped: Callable[[], bool] = lambda: False
) -> Iterator[Grid]:
    """Sample plainly, then with every setting; yield the grid after each image, and now and then in between.

    Args:
        wanted: the prompt, the seed and the sampler; one image of each setting is made.
        stopped: asked after each step; once it is true, nothing more is given.

    Raises:
        UserError: a prompt or an option that cannot be used.
    """
    settings = [None, *((time, value) for time in times for value in lambdas)]
    prepared = [_prepared(ready, wanted, setting) for setting in settings]
    grid = Grid(times, lambdas, calls=sum(len(one.timesteps) for one in prepared))
    for setting, one in zip(settings, prepared, strict=True):
        steps = Steps(_sampler(one, wanted.seed))
        try:
            for number, _ in enumerate(steps):
                if stopped():
                    return
                grid.done += 1
                if number % 5 == 0:
                    yield grid
        finally:
            steps.close()
        [image] = to_images(steps.result)
        if setting is None:
            grid.plain = image
        else:
            grid.images[setting] = image
        yield grid


def _sampler(prepared: Prepared, seed: int) -> Callable[[Callback], Any]:
    return lambda tell: prepared.sample([0], [0], [seed], Observers(tell))


def _prepared(ready: Ready, wanted: Wanted, setting: tuple[float, float] | None) -> Prepared:
    if setting is None:
        return ready.pipeline.prepare(dataclasses.replace(wanted, n=1).request(False))
    own = dataclasses.replace(wanted, n=1, agg_time=setting[0], agg_lambda=setting[1])
    return ready.pipeline.prepare(own.request(True))


@dataclass(frozen=True)
class PlaneEncoders:
    """Encoders of the two axes."""

    clip: Encoder
    instance: Encoder

    @staticmethod
    def load(names: tuple[str, str], model: str, device: str) -> "PlaneEncoders":
        """Load encoders by their names, the embedded ones for the embedded model alone.

        Raises:
            UserError: the embedded encoders do not know what another model generates.
        """
        if TINY in names and model != TINY:
            raise UserError(
                f"the plane needs encoders that know what '{model}' generates: start the page with --clip "
                "open_clip:ViT-B-32/openai --instance timm:vit_small_patch16_224.dino"
            )
        return PlaneEncoders(load_encoder(names[0], "clip", device), load_encoder(names[1], "instance", device))


def plane(grid: Grid, wanted: Wanted, ready: Ready, encoders: PlaneEncoders) -> str:
    """Return the fidelity-editability plane of a grid's images as SVG.

    Raises:
        UserError: the concept's reference images are not there.
    """
    text = parse_prompt(wanted.prompt, ready.concept.names).auxiliary  # the prompt without the learned words
    references = encoders.instance.image_features([read_image(file) for file in _references(ready.concept.trained_on)])
    named = [("plain", "plain", grid.plain_image())]
    named += [(f"T_a {t:g} {v:g}", f"T_a {t:g}", grid.images[t, v]) for t in grid.times for v in grid.lambdas]
    images = [image for _, _, image in named]
    texts = encoders.clip.text_features([text]).expand(len(images), -1)
    editability = text_scores(encoders.clip.image_features(images), texts)
    fidelity = image_scores(encoders.instance.image_features(images), references)
    runs = []
    for (name, series, _), x, y in zip(named, editability.tolist(), fidelity.tolist(), strict=True):
        row = ImageScore(name, wanted.prompt, text, f"{wanted.seed}:0", {CLIP_T: x, DINO_I: y})
        runs.append(RunScores(name, Scores((row,), summarize([row], resamples=1)), series))
    described = f"Fidelity over editability of {len(runs)} images; the numbers beside the points are lambda"
    return inline_svg(fidelity_editability_plane(runs), described)


def _references(trained: TrainedOn) -> list[Path]:
    """The images that a concept was learned from."""
    folders = [find(folder) for folder in trained.images]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise UserError("the images that this concept was learned from are not there, so its fidelity cannot be measured")
    return [file for folder in folders for file in list_images(folder)]
