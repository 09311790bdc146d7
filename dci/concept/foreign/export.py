"""A concept written as files of other programs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from dci.concept.concept_file import Concept, LowRank
from dci.concept.foreign import adobe, custom_diffusion, diff, embeddings, lora, whole_model
from dci.concept.foreign.card import CARD, Card
from dci.concept.foreign.layers import Layers
from dci.concept.foreign.metadata import header
from dci.concept.low_rank import compress
from dci.files import safetensors_bytes, write_atomically
from ldm import tokenizer
from ldm.checkpoint import save_weights
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.diffusers_export import write_folder


@dataclass
class Export:
    """The files of an export and their folder; each format's function adds its own."""

    concept: Concept
    model: LatentDiffusion  # the base, without the concept
    folder: Path
    words: list[str]  # the word for each concept in other programs, the stem of its token file
    layers: Layers
    files: list[Path] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # SD names of weights that the format cannot carry
    said: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Stem of the weights' file."""
        return "-".join(self.words)

    @property
    def prompt(self) -> str:
        """What to type for the concepts, in programs that have the token files."""
        named = zip(self.words, self.concept.names, strict=True)
        words = [(word if name.learned else " ".join(name.modifier_tokens), name.class_noun) for word, name in named]
        return " and ".join(f"{word} {noun}" for word, noun in words)

    def write(self, file: str, content: bytes) -> None:
        """Write one file."""
        write_atomically(self.folder / file, content)
        self.files.append(self.folder / file)

    def embeddings(self) -> dict[str, Tensor]:
        """The word for each concept -> the embeddings (n, d) of its tokens; of learned tokens alone."""
        numbers = [len(name.learned) for name in self.concept.names]
        rows = self.concept.modifiers.float().split(numbers)
        return {word: part for word, part in zip(self.words, rows, strict=True) if len(part)}

    def differences(self) -> dict[str, Tensor]:
        """SD name -> W - W_base, in fp32."""
        base = self.model.state_dict()
        return {name: weight - base[name].float().cpu() for name, weight in self.concept.weights(self.model).items()}


def export(
    concept: Concept,
    model: LatentDiffusion,
    to: str,
    folder: Path,
    words: list[str] | None = None,
    rank: int | None = None,
    bundle: bool = False,
    as_folder: bool = False,
) -> Export:
    """Write a concept as another program's files, its tokens beside them, and a card.

    Args:
        model: the base model, without the concept.
        to: one of FORMATS.
        words: the word for each concept in other programs; None: "my" and the class noun.
        rank: of every change in a LoRA; None: exact.
        bundle: put the tokens into the LoRA (or differences) too.
        as_folder: a diffusers folder in place of a single checkpoint.

    Raises:
        UserError: the concept is of another base, or an option does not go with the format.
    """
    _check(to, rank, bundle, as_folder)
    concept.check_base(model)
    said = []
    if rank is not None:
        compression = compress(concept, model, rank, most_megabytes=float("inf"))
        concept, said = compression.concept, [compression.describe()]
    words = _words(concept, words)
    done = Export(concept, model, Path(folder), words, Layers.of(model.config), said=said)
    if to == "checkpoint":
        _checkpoint(done, as_folder)
    elif not concept.changed:
        done.said.append("the concept has no weights, only its tokens were trained: these are written")
    elif to in _HEADED:
        _headed(done, to, bundle)
    else:
        _WRITERS[to](done)
    _tokens(done)
    if done.left:
        more = f" and {len(done.left) - 3} more" if len(done.left) > 3 else ""
        done.said.append(f"left out, for this format cannot carry them: {', '.join(sorted(done.left)[:3])}{more}")
    done.write(CARD, Card(done, to, rank, bundle, as_folder).text().encode(errors="backslashreplace"))
    return done


def _check(to: str, rank: int | None, bundle: bool, as_folder: bool) -> None:
    if to not in FORMATS:
        raise UserError(f"format '{to}': expected one of {', '.join(FORMATS)}")
    if rank is not None and to != "lora":
        raise UserError(f"a rank belongs to the format lora, not to {to}: leave rank= out")
    if bundle and to not in _HEADED:
        raise UserError(f"tokens can be bundled into the formats lora and diff, not into {to}: leave bundle= out")
    if as_folder and to != "checkpoint":
        raise UserError(f"a diffusers folder is a form of the format checkpoint, not of {to}: leave as_folder= out")


def _words(concept: Concept, words: list[str] | None) -> list[str]:
    """Return the word for each concept; one that the vocabulary has already would lose its meaning there."""
    if words is None:
        return ["my" + "".join(c for c in name.class_noun.lower() if c.isalnum()) for name in concept.names]
    if len(words) != len(concept.names) or len(set(words)) < len(words):
        raise UserError(f"words '{','.join(words)}': expected {len(concept.names)} different names, commas between them")
    for word in words:
        if not word.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"words '{word}': expected letters, digits, - and _: it names files and is typed in prompts")
        if len(tokenizer.tokenize(word)) == 1:
            raise UserError(f"words '{word}': an ordinary word, which would lose its meaning: give another, as my{word}")
    return words


def exact_factors(change: Tensor) -> LowRank:
    """Factor a change into itself and the identity: exact, and of the smallest rank that any change fits into."""
    rows, columns = len(change), change[0].numel()
    if rows <= columns:
        return LowRank(torch.eye(rows), change)
    return LowRank(change.flatten(1), torch.eye(columns).view(columns, *change.shape[1:]))


def _headed(done: Export, to: str, bundle: bool) -> None:
    """Write a .safetensors file by kohya's names, whose header says what it is."""
    concept, ranks = done.concept, set()
    if to == "lora":
        whole = {name: d for name, d in done.differences().items() if name not in concept.low_rank}
        changes = {n: exact_factors(d) if d.ndim > 1 else LowRank(d[:, None], d.new_ones(1)) for n, d in whole.items()}
        tensors, done.left = lora.write(changes | concept.low_rank, done.layers)
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(lora.DOWN)}
    else:
        tensors, done.left = diff.write(done.differences(), done.layers)
    if bundle:
        for word, rows in done.embeddings().items():
            tensors |= embeddings.bundle(word, rows, done.model.config.token_widths)
    if not tensors:
        raise UserError(f"the format {to} can carry nothing of what this concept changes: export a whole checkpoint")
    facts = header(concept, done.model.config, done.name, done.prompt, ranks)
    done.write(f"{done.name}-{to}.safetensors", safetensors_bytes(tensors, facts))


def _checkpoint(done: Export, as_folder: bool) -> None:
    state = whole_model.state_of(done.concept.weights(done.model), done.model)
    if as_folder:
        folder = done.folder / f"{done.name}-diffusers"
        write_folder(state, done.model.config, folder)
        done.files.append(folder)
    else:
        file = done.folder / f"{done.name}-checkpoint.safetensors"
        save_weights(state, file, format="pt")  # straight into the file: a second copy in memory would be as large
        done.files.append(file)


def _diffusers(done: Export) -> None:
    weights, base = done.concept.weights(done.model), done.model.state_dict()
    content, done.left = custom_diffusion.write(weights, base, done.layers)
    done.write(custom_diffusion.WEIGHTS, _pickled(content))
    for token, row in _named_tokens(done.concept).items():
        done.write(f"{token}.bin", _pickled(embeddings.write(token, row, done.model.config.token_widths)))


def _adobe(done: Export) -> None:
    weights = done.concept.weights(done.model)
    content, done.left = adobe.write_ckpt(weights, done.concept.modifiers)
    done.write("delta.ckpt", _pickled(content))
    done.write("delta.bin", _pickled(adobe.write_bin(weights, _named_tokens(done.concept), done.layers)))


def _named_tokens(concept: Concept) -> dict[str, Tensor]:
    """Name of each modifier token -> its embedding (d,) in fp32."""
    rows = concept.modifiers.detach().float().cpu()
    return {token: row.clone() for token, row in zip(concept.modifier_tokens, rows, strict=True)}


def _tokens(done: Export) -> None:
    for word, rows in done.embeddings().items():
        tensors = embeddings.write(word, rows, done.model.config.token_widths)
        done.write(f"{word}.safetensors", safetensors_bytes(tensors, {"format": "pt"}))


def _pickled(content: dict) -> bytes:
    stream = BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


_HEADED = ("lora", "diff")
_WRITERS: dict[str, Callable[[Export], None]] = {"diffusers": _diffusers, "adobe": _adobe}
FORMATS = (*_HEADED, *_WRITERS, "checkpoint")
"""What a concept can be exported to."""
