"""A concept from files of other programs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dci.concept.concept_file import FORMAT, Concept, LowRank
from dci.concept.foreign.content import Content, joined
from dci.concept.foreign.half import half
from dci.concept.foreign.layers import PAIR, TEXT, UNET, Layers
from dci.concept.foreign.opening import Opened, open_file, understand
from dci.concept.foreign.repetition import without_repetition
from dci.concept.modifier_tokens import ConceptName
from ldm import tokenizer
from ldm.checkpoint import fingerprint
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats import presets
from ldm.formats.weights import read_safetensors
from ldm.shipped import find
from ldm.texts import shell_words


@dataclass(frozen=True)
class Imported:
    """A concept, and what was recognised in its files."""

    concept: Concept
    said: tuple[str, ...]


def is_foreign(file: str | Path) -> bool:
    """Whether a file is to be imported: any but a concept file of ours; one that is missing counts as ours."""
    path = find(file)
    if path.is_dir() or path.suffix.lower() != ".safetensors":
        return path.exists()
    return path.is_file() and read_safetensors(path)[1].get("format") != FORMAT


def import_concept(
    files: Sequence[str | Path],
    class_noun: str | None = None,
    trigger: str | None = None,
    config: ModelConfig | None = None,
    load: Callable[[], LatentDiffusion] | None = None,
    which: str = "all",
    identify: bool = True,
) -> Imported:
    """Read a concept from one or several files: weights, tokens, or both.

    Args:
        class_noun: the ordinary word for the concept; of several concepts in the files with commas between them.
        trigger: the words that stand for the concept in prompts, where no token was learned for it.
        config: of the base model; None: inferred from the shapes where possible.
        load: loads the base model, where it is known: the concept then keeps its fingerprint.
        which: of a model tuned as a whole: "all" of its difference or "cross-attention".
        identify: load the base model for its fingerprint, also where nothing else needs it.

    Raises:
        UserError: a file is missing, broken, hostile, of no known kind or of another model, or lacks what is needed.
    """
    _check_foreign(files)
    opened = [open_file(file) for file in files]
    loaded: list[LatentDiffusion] = []

    def base() -> LatentDiffusion | None:
        if load and not loaded:
            loaded.append(load())
        return loaded[0] if loaded else None

    layers = Layers.of(config or _told_by(opened))
    contents = [understand(each, layers, base, which) for each in opened]
    said = [f"{each.source}: {describe(content)}" for each, content in zip(opened, contents, strict=True)]
    contents, repeated = without_repetition([each.source for each in opened], contents)
    content = joined(contents)
    said += [*content.said, *repeated]
    names, facts = _names(content, class_noun, trigger), content.facts
    model = base() if identify or loaded else None
    concept = Concept(
        keys_values={name: half(weight) for name, weight in content.weights.items()},
        modifiers=_rows(content, layers),
        prefixes=torch.zeros(0, 0, sum(layers.config.token_widths)),
        suffixes=torch.zeros(0, 0, sum(layers.config.token_widths)),
        names=names,
        base=fingerprint(model) if model else facts.get("base", ""),
        base_name=layers.config.name if model else facts.get("base_name", layers.config.name),
        config={"imported": [str(file) for file in files]},
        low_rank={n: LowRank(_usual(change.u), _usual(change.v)) for n, change in content.low_rank.items()},
        changes={name: _usual(change) for name, change in content.changes.items()},
    )
    if model and facts.get("base") not in (None, "", concept.base):
        said.append(f"note: it was exported from a concept of another base model ({facts['base_name']}, {facts['base']})")
    if not concept.base and identify:
        said.append("its base model is not known, and cannot be checked later: give it as model= to have that done")
    return Imported(concept, tuple(said))


def _check_foreign(files: Sequence[str | Path]) -> None:
    """Raise UserError for concept files of ours among the files."""
    ours = [str(file) for file in files if find(file).is_file() and not is_foreign(file)]
    if len(ours) > 1:
        raise UserError(
            f"{' and '.join(ours)} are concept files, and one is taken at a time: merge them first: "
            f"dci merge {shell_words(ours)} --out MERGED.safetensors"
        )
    if ours:
        what = "goes with no other program's file: give it alone, and a LoRA as loras=" if len(files) > 1 else ""
        raise UserError(f"{ours[0]} is a concept file already: {what or 'it needs no import'}")


def describe(content: Content) -> str:
    """Say what a file holds, in one line."""
    changed = [*content.weights, *content.low_rank, *content.changes]
    places = Counter(
        "UNet" if name.startswith(UNET) else "text encoder" if name.startswith((TEXT, *PAIR)) else "autoencoder"
        for name in changed
    )
    parts = [f"{number} weights of the {place}" for place, number in places.items()]
    ranks = {change.u.shape[1] for change in content.low_rank.values()}
    if ranks:
        parts.append(f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}")
    tokens = sum(len(rows) for rows in content.tokens)
    parts += [f"{tokens} learned token{'s' if tokens > 1 else ''}"] if tokens else []
    return f"{content.kind} ({', '.join(parts)})"


_WIDTHS = {768: presets.sd_v1, 1024: presets.sd_v2, 2048: presets.sdxl}


def _told_by(opened: list[Opened]) -> ModelConfig:
    """Return the published model that files are made for, by the width of its text context.

    Raises:
        UserError: they have no such context, or one that no published model has.
    """
    widths = {width for each in opened for width in _widths(each)}
    if len(widths) != 1 or not widths <= _WIDTHS.keys():
        found = f"a text context {' or '.join(map(str, sorted(widths)))} wide" if widths else "nothing that tells its model"
        raise UserError(f"{opened[0].source} has {found}: give the model that it was made for as model=")
    return _WIDTHS[widths.pop()]()


def _widths(opened: Opened) -> set[int]:
    content = opened.content
    state = content.get("state_dict", content.get("unet", content))
    tensors = {str(name): value for name, value in dict(state).items()} if isinstance(state, dict) else {}
    tensors = {name: value["v"] if isinstance(value, dict) and "v" in value else value for name, value in tensors.items()}
    named = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.ndim > 1}
    ups = (".lora_up.", ".lora_B.", ".lora.up.", "_lora.up.")
    keys = ("attn2.to_k", "attn2_to_k", "attn2.to_v", "attn2_to_v", "attn2.processor.to_k", "attn2.processor.to_v")
    found = {
        value.shape[1]
        for name, value in named.items()
        if any(key in name for key in keys) and not any(up in name for up in ups)
    }
    inner = content.get("string_to_param")
    rows = inner.values() if isinstance(inner, dict) else tensors.values() if len(tensors) < 10 else ()
    return found or {value.shape[-1] for value in rows if isinstance(value, Tensor) and value.ndim in (1, 2)}


def _names(content: Content, class_noun: str | None, trigger: str | None) -> tuple[ConceptName, ...]:
    """Return how prompts name the concept, or the concepts."""
    noun = class_noun or content.facts.get("class_noun")
    if not noun:
        raise UserError(
            "the files do not tell what the concept is: give the ordinary word for it as class_noun=, such as dog"
        )
    nouns = [" ".join(part.split()) for part in noun.split(",")]
    if not all(nouns):
        raise UserError(f"class_noun '{noun}': expected an ordinary word, such as dog")
    number = sum(len(rows) for rows in content.tokens)
    if number and trigger:
        raise UserError(f"trigger '{trigger}': the files bring {number} learned tokens for the concept: leave it out")
    if not number:
        return (ConceptName((_trigger(content, noun, trigger),), noun),)
    groups = [len(rows) for rows in content.tokens] if len(content.tokens) == len(nouns) else [1] * number
    groups = [number] if len(nouns) == 1 else groups
    if len(groups) != len(nouns):
        raise UserError(
            f"class_noun '{noun}': {len(nouns)} concepts, but {number} learned tokens: give one noun for all of "
            "them, or one for each"
        )
    numbered = iter(range(1, number + 1))
    return tuple(
        ConceptName(tuple(f"<new{next(numbered)}>" for _ in range(n)), noun) for n, noun in zip(groups, nouns, strict=True)
    )


def _trigger(content: Content, noun: str, trigger: str | None) -> str:
    """Return the words that stand for a concept without learned tokens, those that were given first."""
    if not trigger and content.facts.get("tokens", "0") != "0":
        raise UserError(
            f"the concept's {content.facts['tokens']} learned tokens lie in a file of their own: give it too, "
            "beside the weights"
        )
    words = " ".join((trigger or content.trigger.partition(",")[0]).split())
    words = words.removesuffix(noun).strip() if words != noun else words
    if not words or words.startswith("<") or not tokenizer.tokenize(words):
        raise UserError(
            "no token was learned for the concept: give the words that stand for it in prompts as trigger=, such as sks"
        )
    return words


def _rows(content: Content, layers: Layers) -> Tensor:
    """Return all tokens' embeddings (k, d) in fp32."""
    width = sum(layers.config.token_widths)
    return torch.cat([torch.zeros(0, width), *(rows.float() for rows in content.tokens)])


def _usual(tensor: Tensor) -> Tensor:
    """In a precision of concept files, on the CPU."""
    return tensor.detach().cpu().float().contiguous() if tensor.element_size() > 4 else tensor.detach().cpu().contiguous()
