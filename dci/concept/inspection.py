"""A look into a concept: its tokens, the words they are near, and how far each layer has moved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dci.concept.concept_file import Concept
from ldm import tokenizer
from ldm.diffusion import LatentDiffusion


@dataclass(frozen=True)
class Neighbour:
    """A word of the vocabulary near a learned embedding."""

    word: str
    cosine: float


@dataclass(frozen=True)
class LearnedToken:
    """One learned embedding."""

    name: str  # "<new1>", "prefix 2 of image 0", ...
    norm: float
    nearest: list[Neighbour]  # nearest first


def inspect_tokens(concept: Concept, model: LatentDiffusion, nearest: int = 5, contexts: bool = True) -> list[LearnedToken]:
    """Return every learned embedding with its length and the vocabulary words of the largest cosine.

    Args:
        contexts: the image-specific contexts too, not the modifier tokens alone.
    """
    concept.check_base(model)
    named = list(zip(concept.modifier_tokens, concept.modifiers, strict=True))
    if contexts:
        for part, rows in (("prefix", concept.prefixes), ("suffix", concept.suffixes)):
            named += [(f"{part} {i} of image {p}", row[i]) for p, row in enumerate(rows) for i in range(len(row))]
    if not named:
        return []
    vectors = torch.stack([vector.float() for _, vector in named])
    tables = [table.detach().float().cpu() for table in model.text_encoder.token_tables]
    halves = vectors.split([table.shape[1] for table in tables], dim=1)
    found = []
    for number, (table, rows) in enumerate(zip(tables, halves, strict=True), 1):
        which = f", encoder {number}" if len(tables) > 1 else ""  # SDXL's tokens are pairs
        near = _nearest(rows, table, nearest)
        found += [
            LearnedToken(name + which, row.norm().item(), words)
            for (name, _), row, words in zip(named, rows, near, strict=True)
        ]
    return found


def _nearest(vectors: Tensor, table: Tensor, number: int) -> list[list[Neighbour]]:
    """The words of a token table (vocabulary, d) that are nearest to each of the vectors (n, d)."""
    cosines = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(table).T
    values, ids = cosines.topk(min(number, len(table)), dim=1)
    return [
        [Neighbour(tokenizer.decode([i]), cosine) for i, cosine in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def weight_changes(concept: Concept, model: LatentDiffusion) -> dict[str, float]:
    """Return |W - W_base| / |W_base| (Frobenius) of each weight, in the order in which the UNet runs.

    Args:
        model: the base model, without the concept.
    """
    base, weights = model.state_dict(), concept.weights(model)

    def change(name: str) -> float:
        before: Tensor = base[name].float().cpu()
        return ((weights[name] - before).norm() / before.norm()).item()

    return {name: change(name) for name in base if name in weights}


def short_name(weight: str) -> str:
    """ "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" -> "input 1"."""
    part, _, rest = weight.removeprefix("model.diffusion_model.").partition("_block")
    number = rest.lstrip("s.").split(".")[0] if part != "middle" else ""
    return f"{part} {number}".strip()


def kind_of(weight: str) -> str:
    """ "...attn2.to_k.weight" -> "to_k"; of a bias "to_out.0.bias"."""
    return weight.split("attn2.")[-1].removesuffix(".weight")
