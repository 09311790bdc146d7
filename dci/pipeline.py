"""From a concept file to pictures, in Python."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dci.concept import Concept
from dci.maps import MapsCallback
from dci.prompts import BranchPrompts, parse_prompt
from dci.sampling import sample
from dci.settings import dual_branch, sampling_options
from ldm.acceleration import accelerate, fastest_precision
from ldm.canvas import Canvas, fitting_size
from ldm.checkpoint import load_model
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.hub import is_hub_id
from ldm.images import to_pictures
from ldm.loop import Callback
from ldm.sampling import SamplingOptions

_TINY = Path(__file__).resolve().parent.parent / "configs/model/tiny.yaml"


@dataclass(frozen=True)
class Pipeline:
    """A model with a concept applied, ready to draw."""

    model: LatentDiffusion
    concept: Concept
    base: dict[str, Tensor]  # the weights that the concept replaced

    @staticmethod
    def load(
        concept: str | Path,
        model: str | Path | None = None,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Pipeline":
        """Load a concept file and the base model that it belongs to.

        Args:
            model: anything that scripts/sample_dci.py takes for --model; None: what the concept was trained on.
            checkpoint: weights in place of the model's own.
            device: None: CUDA where there is one, else the CPU.
            dtype: of the networks; None: what the device computes them fastest in, as `pipeline.model.dtype` tells.

        Raises:
            UserError: a file is missing or broken, or the concept was learned on another base model.
        """
        found = Concept.load(concept)
        if model is None:
            model, trained = _trained_on(found)
            checkpoint = checkpoint or trained
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(model, checkpoint, dtype=dtype or partial(fastest_precision, device=device))
        base = found.replaced(loaded)
        found.apply(loaded)
        accelerate(loaded, device)
        return Pipeline(loaded.to(device), found, base)

    def __call__(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        *,
        dci: bool = True,
        negative: str = "",
        auxiliary_noun: str | None = None,
        init_image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        batch_size: int = 8,
        callback: Callback | None = None,
        maps: MapsCallback | None = None,
        **settings: float | int | str | bool | Sequence[str],
    ) -> list[Image.Image]:
        """Draw `n` pictures of a prompt, or of each of several prompts, which name the concept V* or {}.

        Args:
            dci: False samples the fine-tuned model plainly.
            negative: what to lead away from.
            auxiliary_noun: a noun that the base model knows well; None: the class noun.
            init_image: RGB picture to start from; with `strength`, 0 (the picture itself) to 1 (all steps),
                and with `mask`, white where to paint.
            batch_size: pictures made at a time, of whatever prompts.
            callback: gets {"x", "i", "t", "denoised"} after each step, see `ldm.loop`.
            maps: gets a `dci.maps.BranchMaps` for every integrated layer while both branches run.
            settings: fields of `ldm.sampling.SamplingOptions` (seed, steps, scale, solver, height, ...) and of
                `dci.integration.DualBranch` (agg_time, agg_lambda, gain, layers, ...); the others are the model's.

        Returns:
            RGB pictures, those of a prompt one after another.

        Raises:
            UserError: a prompt that does not name the concept, or a setting that cannot be used.
        """
        if n < 1 or batch_size < 1:
            raise UserError(f"n={n}, batch_size={batch_size}: expected 1 or more")
        prompts = [self.parse(text, auxiliary_noun) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        sampler = {name: settings.pop(name) for name in _SAMPLER & settings.keys()}
        canvas, options = self._canvas(init_image, mask, strength, sampler)
        dual = dual_branch(self.model, **settings)
        rows = [(branches, index) for branches in prompts for index in range(n)]
        pictures = []
        for start in range(0, len(rows), batch_size):
            branches, indices = (list(column) for column in zip(*rows[start : start + batch_size], strict=True))
            pixels = sample(self.model, self.concept, branches, indices, options, dual if dci else None, callback,
                            negative, canvas, self.base, maps)  # fmt: skip
            pictures += to_pictures(pixels)
        return pictures

    def parse(self, prompt: str, auxiliary_noun: str | None = None) -> BranchPrompts:
        """Return both branches' prompts, and where the concept and its noun stand in them."""
        concept = self.concept
        return parse_prompt(prompt, concept.modifier_tokens, concept.class_noun, auxiliary_noun, concept.several)

    def _canvas(
        self, picture: Image.Image | None, mask: Image.Image | None, strength: float | None, given: dict[str, Any]
    ) -> tuple[Canvas | None, SamplingOptions]:
        """Return the picture to start from and the options, whose size follows it."""
        if picture is None:
            if mask is not None or strength is not None:
                raise UserError("mask and strength need a picture to start from: give it as init_image")
            return None, sampling_options(self.model, **given)
        height, width = fitting_size(self.model, picture)
        options = sampling_options(self.model, **{"height": height, "width": width, **given})
        strength = strength if strength is not None else 1.0 if mask else 0.75
        return Canvas.of(self.model, picture, options.height, options.width, strength, mask), options


_SAMPLER = {field.name for field in dataclasses.fields(SamplingOptions)}


def _trained_on(concept: Concept) -> tuple[str, str | None]:
    """Return the model that a concept was learned on, and its checkpoint."""
    model, checkpoint = concept.config.get("model"), concept.config.get("checkpoint")
    if model and (Path(model).exists() or is_hub_id(model)):
        return model, checkpoint
    if concept.base_name == "tiny" and _TINY.is_file():
        return str(_TINY), None
    raise UserError(f"the base model '{concept.base_name}' ({model}) of this concept is not there: name it as model=")
