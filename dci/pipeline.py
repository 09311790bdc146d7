"""From a concept file to images: the one road of Python users and of the sampling programs.

Request -> Pipeline.prepare -> Prepared -> Prepared.sample, batch by batch
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dci.concept.concept_file import Concept
from dci.concept.foreign.importing import import_concept, is_foreign
from dci.concept.loras import add_trained_loras, on_loras
from dci.concept.prompts import MARK, BranchPrompts, negative_ids, parse_prompt
from dci.dual_branch.attention_maps import MapsCallback
from dci.dual_branch.integration import DualBranch
from dci.dual_branch.layer_selection import check_layers
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.sampling import Observers, SampleRequest, sample
from ldm.checkpoint import load_model, model_config
from ldm.diffusion import LatentDiffusion
from ldm.errors import Note, UserError
from ldm.images import to_images
from ldm.init_image import InitImage, fitting_size
from ldm.option_types import checked, names_of, refuse_unknown
from ldm.prompt_notes import option_notes, prompt_notes
from ldm.runtime.acceleration import accelerate, fastest_precision, pick_device
from ldm.sampling_loop import Callback
from ldm.shipped import ROOT
from ldm.text_to_image import SamplingOptions, make_solver, text_to_image

_TINY = ROOT / "configs/model/tiny.yaml"


@dataclass(frozen=True)
class Request:
    """What to sample: prompts that name the concept V* or {}, and how."""

    prompt: str | Sequence[str]  # one, or several
    n: int = 1  # images of each prompt
    dci: bool = True  # False samples the fine-tuned model plainly
    negative: str = ""  # what to lead away from; may name the concept
    auxiliary_noun: str | None = None  # one that the base model knows well; None: the class noun
    init_image: Image.Image | None = None  # RGB image to start from
    mask: Image.Image | None = None  # of its size, white where to paint
    strength: float | None = None  # 0 (the image itself) to 1 (all steps); None: 0.75, with a mask 1
    batch_size: int = 8  # images made at a time, of whatever prompts
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ldm.text_to_image.SamplingOptions` (seed, steps, scale, solver, height, ...) and of
    `dci.dual_branch.integration.DualBranch` (agg_time, agg_lambda, gain, ...); the others are the model's."""

    @property
    def prompts(self) -> list[str]:
        """The prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def check(self) -> None:
        """Raise UserError for an option that there is not, or of another type or range."""
        refuse_unknown(self.settings, OPTIONS)
        some = isinstance(self.prompt, (str, Sequence)) and len(self.prompts) > 0
        if not some or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise UserError(f"prompt {self.prompt!r}: expected text, or a list of texts")
        checked(Request, {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in _CHECKED})
        for name in ("n", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 1 or more")
        for name in ("init_image", "mask"):
            if not isinstance(getattr(self, name), (Image.Image, type(None))):
                raise UserError(f"{name} {getattr(self, name)!r}: expected a PIL image, such as Image.open(file)")
        if self.init_image is None and (self.mask is not None or self.strength is not None):
            name = "mask" if self.mask is not None else "strength"
            raise UserError(f"{name}= needs an image to start from: give it as init_image=")


_CHECKED = ("n", "dci", "negative", "auxiliary_noun", "strength", "batch_size")
OPTIONS = names_of(Request, SamplingOptions, DualBranch) - {"prompt", "settings"} | {"callback", "maps"}
"""What a `Pipeline` can be called with besides prompts."""


@dataclass(frozen=True)
class Prepared:
    """A request that is checked and read, ready to be sampled in whatever batches."""

    pipeline: "Pipeline"
    request: Request
    prompts: list[BranchPrompts]  # of both branches; [] without a concept
    options: SamplingOptions
    dual: DualBranch | None  # None: plain sampling
    init: InitImage | None
    timesteps: list[int]  # of the UNet's calls
    notes: list[str]  # what has no effect

    @property
    def dual_steps(self) -> int:
        """How many of the calls have both branches."""
        return sum(self.dual.is_dual(t) for t in self.timesteps) if self.dual else 0

    def warn(self) -> None:
        """Give the notes as warnings."""
        for note in self.notes:
            warnings.warn(note, Note, stacklevel=3)

    def sample(
        self, prompts: Sequence[int], indices: Sequence[int], seeds: Sequence[int] | None, observers: Observers | None = None
    ) -> Tensor:
        """Sample a batch: pixels (b, 3, h, w) in [-1, 1].

        Args:
            prompts: the number of each image's prompt in the request.
            indices: of each image under its prompt and seed.
            seeds: of each image; None: the options' for all.
        """
        model, concept, negative = self.pipeline.model, self.pipeline.concept, self.request.negative
        own = None if seeds is None else list(seeds)
        if concept is None:
            texts, callback = self.request.prompts, observers.callback if observers else None
            rows = [texts[number] for number in prompts]
            return text_to_image(model, rows, list(indices), self.options, callback, negative, self.init, own)
        batch = SampleRequest(
            [self.prompts[number] for number in prompts],
            list(indices),
            self.options,
            self.dual,
            negative,
            self.init,
            self.pipeline.base,
            own,
        )
        return sample(model, concept, batch, observers)


@dataclass(frozen=True)
class Pipeline:
    """A model with a concept applied, ready to sample; or a base model alone."""

    model: LatentDiffusion
    concept: Concept | None
    base: dict[str, Tensor]  # the weights that the concept replaced

    @staticmethod
    def of(model: LatentDiffusion, concept: Concept | None = None) -> "Pipeline":
        """Apply a concept to its loaded base model.

        Raises:
            UserError: the concept was learned on another base model, or one is applied already.
        """
        if concept is None:
            return Pipeline(model, None, {})
        base = concept.replaced(model)
        concept.apply(model)
        return Pipeline(model, concept, base)

    @staticmethod
    def load(
        concept: str | Path | Sequence[str | Path],
        model: str | Path | None = None,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        class_noun: str | None = None,
        trigger: str | None = None,
        loras: Sequence[str] = (),
        strength_concept: float = 1.0,
        vae: str | Path | None = None,
    ) -> "Pipeline":
        """Load a concept file and the base model that it belongs to.

        Args:
            concept: a concept file, or one or several files of other programs (`dci.concept.foreign.importing`).
            model: YAML, weights' file, diffusers folder or hub id; None: what the concept was trained on.
            checkpoint: weights in place of the model's own.
            device: None: CUDA where there is one, else the CPU.
            dtype: of the networks; None: what the device computes them fastest in; `pipeline.model.dtype` says which.
            class_noun: of another program's files: the ordinary word for the concept.
            trigger: of another program's files: the words for the concept in prompts, where no token was learned.
            loras: put on the base model beside the concept: "FILE" or "FILE:0.8" each.
            strength_concept: factor on the concept's change of the weights, 0 to 1.5.
            vae: file or folder of an autoencoder in place of the model's own; None: where `model` is None, the one
                that the concept was trained with.

        Raises:
            UserError: a file is missing or broken, or the concept was learned on another base model.
        """
        files = [concept] if isinstance(concept, (str, Path)) else list(concept) if isinstance(concept, Sequence) else []
        if not files or not all(isinstance(file, (str, Path)) for file in files):
            raise UserError(f"concept {concept!r}: expected a file, or a list of files")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise UserError(f"dtype {dtype!r}: expected a torch.dtype, such as torch.float16")
        if isinstance(strength_concept, bool) or not isinstance(strength_concept, (int, float)):
            raise UserError(f"strength_concept {strength_concept!r}: expected a number")
        found = _read(files, model, checkpoint, class_noun, trigger)
        if model is None:
            model, trained = _trained_on(found)
            vae = vae or (found.trained_on.own_vae() if model == found.trained_on.model else None)
            checkpoint = checkpoint or trained
        device = pick_device("auto" if device is None else str(device))
        loaded = load_model(model, checkpoint, dtype=dtype or partial(fastest_precision, device=device), vae=vae)
        add_trained_loras(loaded, found, loras)
        found = on_loras(found, loaded, loras, strength_concept)
        accelerate(loaded, device)
        return Pipeline.of(loaded.to(device), found)

    def __call__(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        *,
        callback: Callback | None = None,
        maps: MapsCallback | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Sample `n` images of a prompt, or of each of several prompts, which name the concept V* or {}.

        Args:
            callback: gets {"x", "i", "t", "denoised"} after each step, see `ldm.sampling_loop`.
            maps: gets a `dci.dual_branch.attention_maps.BranchMaps` for every integrated layer while both branches run.
            options: fields of `Request` (negative, auxiliary_noun, init_image, batch_size, ...) and of its settings
                (seed, steps, agg_time, ...).

        Returns:
            RGB images, those of a prompt one after another.

        Raises:
            UserError: a prompt that does not name the concept, or an option that cannot be used.
        """
        refuse_unknown(options, OPTIONS)
        for name, observer in (("callback", callback), ("maps", maps)):
            if observer is not None and not callable(observer):
                raise UserError(f"{name} {observer!r}: expected a function")
        own = {name: options.pop(name) for name in names_of(Request) & options.keys()}
        return self.generate(Request(prompt, n, **own, settings=options), Observers(callback, maps))

    def generate(self, request: Request, observers: Observers | None = None) -> list[Image.Image]:
        """Sample all images of a request; see `__call__`. What has no effect becomes a warning, `ldm.errors.Note`."""
        prepared = self.prepare(request)
        prepared.warn()
        rows = [(prompt, index) for prompt in range(len(request.prompts)) for index in range(request.n)]
        images: list[Image.Image] = []
        for start in range(0, len(rows), request.batch_size):
            prompts, indices = zip(*rows[start : start + request.batch_size], strict=True)
            images += to_images(prepared.sample(prompts, indices, None, observers))
        return images

    def prepare(self, request: Request) -> Prepared:
        """Read and check a request.

        Raises:
            UserError: a prompt that does not name the concept, or an option that cannot be used.
        """
        request.check()
        prompts = [self.parse(text, request.auxiliary_noun) for text in request.prompts] if self.concept else []
        if self.concept:
            negative_ids(request.negative, self.concept.names)
        given = {name: value for name, value in request.settings.items() if value is not None}
        init, options = self._start(request, {name: given.pop(name) for name in names_of(SamplingOptions) & given.keys()})
        dual = dual_branch(self.model, options.height, options.width, **given)
        if request.dci and self.concept:
            check_layers(self.model, options, dual.layers)
        timesteps = make_solver(self.model, options, init).timesteps
        used = dual if request.dci and self.concept else None
        found = Prepared(self, request, prompts, options, used, init, timesteps, [])
        return dataclasses.replace(found, notes=_notes(found))

    def parse(self, prompt: str, auxiliary_noun: str | None = None) -> BranchPrompts:
        """Return both branches' prompts, and where the concept and its noun stand in them.

        Raises:
            UserError: the pipeline has no concept, or the prompt does not name it or is too long.
        """
        if self.concept is None:
            raise UserError("this pipeline has no concept: prompts are read as they stand")
        return parse_prompt(prompt, self.concept.names, auxiliary_noun)

    def _start(self, request: Request, given: dict[str, Any]) -> tuple[InitImage | None, SamplingOptions]:
        """Return the image to start from and the options, whose size follows it."""
        image, mask, strength = request.init_image, request.mask, request.strength
        if image is None:
            return None, sampling_options(self.model, **given)
        height, width = fitting_size(self.model, image)
        options = sampling_options(self.model, **{"height": height, "width": width, **given})
        strength = strength if strength is not None else 1.0 if mask else 0.75
        return InitImage.of(self.model, image, options.height, options.width, strength, mask), options


def _notes(prepared: Prepared) -> list[str]:
    """Return a note for each option and each piece of prompt syntax that has no effect."""
    request, dual, init = prepared.request, prepared.dual, prepared.init
    texts = [*request.prompts, request.negative]
    notes = prompt_notes(texts)
    mark = next((found for text in texts if (found := re.search(MARK, text, re.IGNORECASE))), None)
    if prepared.pipeline.concept is None and mark:
        notes.append(f"'{mark.group()}' names a concept, and there is none: it is read as text; sample with a concept file")
    strength = init.strength if init else None
    notes += option_notes(
        request.negative, prepared.options.scale, strength, prepared.options.steps, len(prepared.timesteps)
    )
    if dual and dual.agg_time > 0 and prepared.timesteps and not prepared.dual_steps:
        notes.append(
            f"the first timestep is {max(prepared.timesteps)}, and both branches run above {1000 - 1000 * dual.agg_time:g}: "
            "this is plain sampling; raise agg_time="
        )
    return notes


def _read(
    files: list[str | Path],
    model: str | Path | None,
    checkpoint: str | Path | None,
    class_noun: str | None,
    trigger: str | None,
) -> Concept:
    """Return a concept of our file, or of other programs'."""
    if len(files) == 1 and not is_foreign(files[0]):
        if class_noun or trigger:
            raise UserError(f"class_noun and trigger are for other programs' files: {files[0]} has its own")
        return Concept.load(files[0])
    if model is None:
        raise UserError(f"{files[0]} is another program's file: name its base model as model=")
    load = partial(load_model, model, checkpoint, dtype=None)
    return import_concept(files, class_noun, trigger, model_config(model), load, identify=False).concept


def _trained_on(concept: Concept) -> tuple[str, str | None]:
    """Return the model that a concept was learned on, and its checkpoint."""
    trained = concept.trained_on
    if trained.model and trained.is_there:
        return trained.model, trained.checkpoint
    if concept.base_name == "tiny" and _TINY.is_file():
        return str(_TINY), None
    raise UserError(
        f"the base model '{concept.base_name}' ({trained.model}) of this concept is not there: name it as model="
    )
