"""A concept in a pipeline: its keys and values in the UNet's weights, its tokens in tokenizer and text encoder."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dci.concept.concept_file import Concept
from dci.concept.foreign.importing import import_concept, is_foreign
from dci.concept.loras import scaled
from dci.diffusers.model import as_model, is_compiled, networks, original, text_parts
from dci.diffusers.tokens import Pooling, add_tokens, check_tokens, pool_as_before, pool_at_end, remove_tokens
from ldm.checkpoint import fingerprint
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.diffusers_names import to_text, to_unet, to_vae
from ldm.tokenizer import MAX_LENGTH
from ldm.unet import UNet

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
logger = logging.getLogger(__name__)
Place = tuple[str, str]
"""A component of a pipeline, and the name of a parameter in it."""


@dataclass(eq=False)
class LoadedConcept:
    """A concept that a pipeline's networks hold."""

    concept: Concept
    tokens: list[str]  # those that have embeddings of their own
    unet: UNet  # our UNet of the same shape, without weights: it knows where the layers are
    layers: list[str]  # diffusers' names of the cross-attention modules, in the order they run
    pooling: Pooling  # how texts were pooled before
    before: dict[Place, Tensor]  # the weights that the concept took the place of
    after: dict[Place, Tensor]  # what it put there
    _changes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def mask_width(self, unet: nn.Module) -> int:
        """Width of the token masks, at least: a compiled UNet is compiled again for others."""
        return MAX_LENGTH - 1 if is_compiled(unet) else 0

    def base_changes(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return W_base - W of every cross-attention layer's keys and values, in the precision and place of `like`."""
        if not self._changes or self._changes[0][0].device != like.device or self._changes[0][0].dtype != like.dtype:
            self._changes = [(self._change(name, "k").to(like), self._change(name, "v").to(like)) for name in self.layers]
        return self._changes

    def _change(self, layer: str, matrix: str) -> Tensor:
        place = ("unet", f"{layer}.to_{matrix}.weight")
        if place not in self.before:
            return torch.zeros(())
        return self.before[place].float() - self.after[place].float()


_LOADED: WeakKeyDictionary[nn.Module, LoadedConcept] = WeakKeyDictionary()
"""Pipelines that share a UNet share its concept."""


def loaded_concept(pipe: Any) -> LoadedConcept | None:
    """Return the concept that a pipeline's UNet holds, None if there is none."""
    return _LOADED.get(original(pipe.unet))


def load(
    pipe: Any,
    files: Concept | Sequence[str | Path],
    class_noun: str | None = None,
    trigger: str | None = None,
    strength: float = 1.0,
    check_base: bool = True,
) -> None:
    """Put a concept into a pipeline; the arguments are those of `DCIPipeline.load_concept`.

    Raises:
        UserError: there is one already, a file cannot be used, the base is another, or weights or tokens do not fit.
    """
    if loaded_concept(pipe) is not None:
        raise UserError(
            "a concept is loaded already: call unload_concept() first, or merge the two files with scripts/merge_concepts.py"
        )
    parameters = _parameters(pipe)
    model = as_model(pipe)
    concept = files if isinstance(files, Concept) else _read(files, model, class_noun, trigger)
    concept = concept if check_base else dataclasses.replace(concept, base="")
    _check(model, concept)
    learned = [token for name in concept.names for token in name.learned]
    check_tokens(pipe, learned)
    weights = _placed(model, scaled(concept, model, strength).weights(model), parameters)
    before = {place: parameters[place][: len(weight)].detach().cpu().clone() for place, weight in weights.items()}
    _copy(weights, parameters)
    add_tokens(pipe, learned, concept.modifiers)
    pooling = pool_at_end(pipe) if learned else []
    names = to_unet(model.config.unet)
    layers = [names(f"{layer.name}.") + "attn2" for layer in model.unet.cross_layers()]
    _LOADED[original(pipe.unet)] = LoadedConcept(concept, learned, model.unet.to("meta"), layers, pooling, before, weights)


def _read(files: Sequence[str | Path], model: LatentDiffusion, class_noun: str | None, trigger: str | None) -> Concept:
    """Return the concept in a file of ours, or in other programs' files."""
    if len(files) == 1 and not is_foreign(files[0]):
        return Concept.load(files[0])
    found = import_concept(files, class_noun, trigger, model.config, lambda: model)
    for line in found.said:
        logger.info(line)
    return found.concept


def unload(pipe: Any) -> None:
    """Take a pipeline's concept out again: all weights, tokens and embeddings are as they were.

    Raises:
        UserError: there is none, or its weights have been changed since.
    """
    loaded = loaded_concept(pipe)
    if loaded is None:
        raise UserError("no concept is loaded: there is nothing to unload")
    parameters = _parameters(pipe)
    changed = [place for place, weight in loaded.after.items() if not _holds(parameters[place][: len(weight)], weight)]
    if changed:
        raise UserError(
            f"{'.'.join(changed[0])} has been changed since the concept was loaded: "
            "call unfuse_lora() first where a LoRA was fused, or load the pipeline anew"
        )
    _copy(loaded.before, parameters)
    remove_tokens(pipe, loaded.tokens)
    pool_as_before(loaded.pooling)
    del _LOADED[original(pipe.unet)]


def _check(model: LatentDiffusion, concept: Concept) -> None:
    if concept.base and (found := fingerprint(model)) != concept.base:
        raise UserError(
            f"this concept was learned on the base model '{concept.base_name}' ({concept.base}), but the pipeline holds "
            f"another ({found}): load the pipeline of that base before any LoRA is fused into it, in fp32 or fp16; or give "
            "check_base=False where the two are close relatives, such as a model and its inpainting version"
        )
    concept.check_fits(model)


def _parameters(pipe: Any) -> dict[Place, nn.Parameter]:
    """All parameters that a concept may change. Fused projections hold copies of some, so they are refused."""
    if any(type(processor).__name__.startswith("Fused") for processor in original(pipe.unet).attn_processors.values()):
        raise UserError("the UNet's projections are fused: call unfuse_qkv_projections() first, and fuse them again later")
    return {(part, name): parameter for part, named in networks(pipe).items() for name, parameter in named.items()}


def _placed(
    model: LatentDiffusion, weights: dict[str, Tensor], parameters: dict[Place, nn.Parameter]
) -> dict[Place, Tensor]:
    """Name weights, by their names in Stable Diffusion, as the pipeline's components name them."""
    config, rename = model.config, to_unet(model.config.unet)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}

    placed = {("unet", rename(name)): weight for name, weight in part(_UNET).items()}
    for text in text_parts(config):
        named = to_text(part(text.place), text.config)
        # transformers 5 leaves the prefix away.
        own = {n if (text.component, n) in parameters else n.removeprefix("text_model."): w for n, w in named.items()}
        placed |= {(text.component, name): weight for name, weight in own.items()}
    return placed | {("vae", name): weight for name, weight in to_vae(part(_VAE), config.autoencoder).items()}


@torch.no_grad()
def _copy(weights: dict[Place, Tensor], parameters: dict[Place, nn.Parameter]) -> None:
    for place, weight in weights.items():
        parameters[place][: len(weight)].copy_(weight)  # a token table may have got further rows


def _holds(parameter: Tensor, weight: Tensor) -> bool:
    """Whether a parameter has a weight's numbers, rounded as the pipeline may have been cast since."""
    found = parameter.detach().cpu()
    casts: Iterable[Tensor] = (weight, weight.half(), weight.bfloat16())
    return any(torch.equal(cast.to(found.dtype), found) for cast in casts)
