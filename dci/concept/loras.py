"""LoRAs put on a base model (a style, say), and how strongly a concept changes it."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dci.concept.concept_file import FORMAT, Concept, LowRank
from dci.concept.foreign.embeddings import bundled_words
from dci.concept.foreign.layers import Layers
from dci.concept.foreign.opening import open_file, understand
from dci.files import content_hash, file_hash
from ldm.checkpoint import fingerprint, load_model
from ldm.diffusion import LatentDiffusion
from ldm.errors import Note, UserError
from ldm.runtime.cpu_convolutions import unpack
from ldm.shipped import find

STRENGTHS = (0.0, 1.5)
"""Ends of the range of a concept's strength."""


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse "FILE" or "FILE:0.8" -> (file, strength).

    Raises:
        UserError: there is no such file.
    """
    name, colon, number = text.rpartition(":")
    try:
        given = (find(name), float(number)) if colon and not find(text).exists() else (find(text), 1.0)
    except ValueError:
        given = (find(text), 1.0)
    if not given[0].exists():
        raise UserError(f"no LoRA {given[0]}: expected FILE, or FILE:0.8 with a strength")
    if not abs(given[1]) < float("inf"):
        raise UserError(f"the LoRA {text} has no strength that can be used: expected a number, such as 0.8")
    return given


def lora_hashes(loras: Iterable[str]) -> dict[str, str]:
    """Return LoRAs, "FILE" or "FILE:0.8" each, with their files' hashes."""
    return {text: content_hash(parse_lora(text)[0]) for text in loras}


def add_loras(model: LatentDiffusion, loras: Sequence[str]) -> None:
    """Put LoRAs on a base model, for good; its fingerprint then differs from that of the base model without them.

    Args:
        loras: "FILE" or "FILE:0.8" each.

    Raises:
        UserError: a file is missing, broken, hostile, made for another model, or holds whole weights.
    """
    if not loras:
        return
    _add(model, [parse_lora(lora) for lora in loras])


@torch.no_grad()
def _add(model: LatentDiffusion, loras: Sequence[tuple[Path, float]], notes: bool = True) -> None:
    known, layers = fingerprint(model), Layers.of(model.config)
    parameters = dict(model.named_parameters())
    unpack(model.unet)
    for file, strength in loras:
        opened = open_file(file)
        if opened.metadata.get("format") == FORMAT:
            raise UserError(f"{file} is a concept file: give it as concept=")
        content = understand(opened, layers, lambda: None, "all")
        if content.weights or not (content.low_rank or content.changes):
            raise UserError(f"{file} holds {content.kind}: expected a LoRA, or differences, to put on the base model")
        if content.tokens and notes:
            _note_tokens(file, opened.content)
        changes = {name: change.product() for name, change in content.low_rank.items()}
        for name, change in [*changes.items(), *content.changes.items()]:
            weight = parameters[name]
            weight.copy_(weight.float() + strength * change.to(weight.device).float())
        known = hashlib.sha256(f"{known} {file_hash(opened.source)} {strength}".encode()).hexdigest()[:16]
    model.loaded_fingerprint = known


def _note_tokens(file: Path, names: Iterable[str]) -> None:
    words = bundled_words(names)
    warnings.warn(
        f"{file} brings embeddings too ({', '.join(words)}), which have no effect here: on a base model a LoRA is its "
        "weights alone; as concept= the file brings both",
        Note,
        stacklevel=3,
    )


def add_trained_loras(model: LatentDiffusion, concept: Concept, asked: Sequence[str] = ()) -> None:
    """Put the LoRAs on a base model that a concept was trained on, if any; see `add_loras`.

    Args:
        asked: LoRAs that the user names. One that training had is looked for among them by its name, should it have
            been moved.

    Raises:
        UserError: as `add_loras`, or one of them is not there any more.
    """
    if trained := _trained_on(concept, asked):
        _add(model, trained, notes=False)  # training has printed them


def _trained_on(concept: Concept, asked: Sequence[str]) -> list[tuple[Path, float]]:
    found = []
    for text in concept.trained_on.loras:
        try:
            found.append(parse_lora(text))
        except UserError as error:
            name, _, strength = text.rpartition(":")
            again = next((file for file, _ in map(parse_lora, asked) if file.name == Path(name).name), None)
            if again is None:
                raise UserError(
                    f"the LoRA {name} that this concept was trained on is not there: put it back; sampling also takes it "
                    "from loras= where it is now"
                ) from error
            found.append((again, float(strength)))
    return found


def _beside(concept: Concept, asked: Sequence[str]) -> list[tuple[Path, float]]:
    """Return the LoRAs to put on a model that has those already that the concept was trained on."""
    trained = {content_hash(file): strength for file, strength in _trained_on(concept, asked)} if asked else {}
    found = []
    for text in asked:
        file, strength = parse_lora(text)
        before = trained.get(content_hash(file))
        if before is None:
            found.append((file, strength))
        elif before == strength or find(text).exists():  # a file's name alone asks for no other strength
            said = f"{file} is on the base model already, with strength {before:g}: the concept was trained on it"
            warnings.warn(said, Note, stacklevel=3)
        else:
            found.append((file, strength - before))  # the strength that is asked for, in place of training's
    return found


def load_with_loras(
    model: str | Path, checkpoint: str | Path | None, loras: Sequence[str], vae: str | Path | None = None
) -> LatentDiffusion:
    """Load a base model in fp32 on the CPU, and put LoRAs on it; see `ldm.checkpoint.load_model` and `add_loras`."""
    loaded = load_model(model, checkpoint, vae=vae)
    add_loras(loaded, loras)
    return loaded


def check_strength(strength: float) -> None:
    """Raise UserError for a factor on a concept's change that is out of range."""
    low, high = STRENGTHS
    if not low <= strength <= high:
        raise UserError(f"strength_concept {strength:g}: expected {low:g} (its tokens alone) to {high:g}")


def scaled(concept: Concept, model: LatentDiffusion, strength: float) -> Concept:
    """Return a concept whose changes are `strength` times as large; its tokens stay.

    Args:
        model: the base model, without the concept.

    Raises:
        UserError: a strength out of range, or another base model.
    """
    check_strength(strength)
    if strength == 1:
        return concept
    relative = as_changes(concept, model)
    return dataclasses.replace(
        relative,
        changes={name: strength * change.float() for name, change in relative.changes.items()},
        low_rank={
            name: LowRank(strength * change.u.float(), change.v.float()) for name, change in relative.low_rank.items()
        },
    )


def as_changes(concept: Concept, model: LatentDiffusion) -> Concept:
    """Return a concept whose whole weights are changes of the base model's, so that it can go onto another.

    Raises:
        UserError: another base model.
    """
    concept.check_base(model)
    base: dict[str, Tensor] = model.state_dict()
    whole = {name: weight.float() - base[name].float().cpu() for name, weight in concept.keys_values.items()}
    return dataclasses.replace(concept, keys_values={}, changes=whole | concept.changes)


def on_loras(concept: Concept, model: LatentDiffusion, loras: Sequence[str], strength: float = 1.0) -> Concept:
    """Put LoRAs on a concept's base model, and return the concept as it is on top of them: base + LoRAs + its change.

    Args:
        model: the base model, without the concept, but with what it was trained on (`add_trained_loras`); it is changed.
        loras: "FILE" or "FILE:0.8" each. One that the concept was trained on is not put on twice; a strength that is
            given takes the place of training's.
        strength: of the concept, see `scaled`.

    Raises:
        UserError: as `add_loras` and `scaled`.
    """
    concept = scaled(concept, model, strength)
    further = _beside(concept, loras)
    if not further:
        return concept
    relative = as_changes(concept, model)
    _add(model, further)
    return dataclasses.replace(relative, base=fingerprint(model))
