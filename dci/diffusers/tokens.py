"""A concept's modifier tokens in a pipeline, as a textual inversion's: entries of the tokenizer, rows of the embeddings.

So a saved pipeline keeps them, and LoRAs and textual inversions of the text encoder go on working beside them.
SDXL has two of each, and a token's embedding is a pair.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dci.diffusers.model import encoders
from ldm import tokenizer as clip
from ldm.errors import UserError

Pooling = list[tuple[Any, int]]
"""Text transformers and their configurations, and the id of the token that each took for a text's end."""


def check_tokens(pipe: Any, names: Sequence[str]) -> None:
    """Raise UserError for a token that the tokenizer already has."""
    known = [name for name in names if any(_has(tokenizer, name) for tokenizer, _ in encoders(pipe))]
    if known:
        raise UserError(
            f"the pipeline's tokenizer has an entry '{known[0]}' already: unload the textual inversion of that name first"
        )


def missing_tokens(pipe: Any, names: Sequence[str]) -> list[str]:
    """Return which tokens are not, or no longer, in each of the pipeline's tokenizers."""
    return [name for name in names if not all(_has(tokenizer, name) for tokenizer, _ in encoders(pipe))]


@torch.no_grad()
def add_tokens(pipe: Any, names: Sequence[str], embeddings: Tensor) -> None:
    """Add tokens and their embeddings (k, d), of several encoders beside each other, behind those that are there."""
    if not names:
        return
    pairs = encoders(pipe)
    tables = [encoder.get_input_embeddings().weight for _, encoder in pairs]
    halves = embeddings.split([table.shape[1] for table in tables], dim=1)
    for (tokenizer, encoder), before, half in zip(pairs, tables, halves, strict=True):
        tokenizer.add_tokens(list(names))
        ids = tokenizer.convert_tokens_to_ids(list(names))
        encoder.resize_token_embeddings(max(len(before), max(ids) + 1), mean_resizing=False)
        weight = encoder.get_input_embeddings().weight.requires_grad_(before.requires_grad)
        weight[ids] = half.to(weight)


@torch.no_grad()
def remove_tokens(pipe: Any, names: Sequence[str]) -> None:
    """Take tokens out again; those that came later move up."""
    if not names:
        return
    for tokenizer, encoder in encoders(pipe):
        before = encoder.get_input_embeddings().weight
        # unload_textual_inversion() without names may have taken them out before.
        gone = {tokenizer.convert_tokens_to_ids(name) for name in names if _has(tokenizer, name)}
        kept = [row for row in range(len(before)) if row not in gone]
        table = nn.Embedding(len(kept), before.shape[1], _weight=before.detach()[kept].clone())
        table.weight.requires_grad_(before.requires_grad)
        encoder.set_input_embeddings(table)
        encoder.config.vocab_size = len(kept)
        _forget(tokenizer, gone)


def pool_at_end(pipe: Any) -> Pooling:
    """Let SDXL's second encoder find a text's end by the end token's id, and return what it did before.

    In published configurations that id is wrong (2), for which transformers takes the token with the largest id. That
    is no longer the end token's once others are added.
    """
    found: Pooling = []
    for _, encoder in encoders(pipe)[1:]:
        modules = list(encoder.modules())
        for one in [*modules, *(module.config for module in modules if hasattr(module, "config"))]:
            if getattr(one, "eos_token_id", None) not in (None, clip.END):
                found.append((one, one.eos_token_id))
                one.eos_token_id = clip.END
    return found


def pool_as_before(pooling: Pooling) -> None:
    """Undo `pool_at_end`."""
    for one, end in pooling:
        one.eos_token_id = end


def _forget(tokenizer: Any, gone: set[int]) -> None:
    """Take entries out of a tokenizer, which knows only how to add; those behind them are numbered anew."""

    def number(entry: int) -> int:
        return entry - sum(other < entry for other in gone)

    if hasattr(tokenizer, "_tokenizer"):  # of the library tokenizers
        content = json.loads(tokenizer._tokenizer.to_str())
        added = [token for token in content["added_tokens"] if token["id"] not in gone]
        content["added_tokens"] = [{**token, "id": number(token["id"])} for token in added]
        tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(content))
        return
    known = {number(i): token for i, token in tokenizer._added_tokens_decoder.items() if i not in gone}
    tokenizer._added_tokens_decoder = known
    tokenizer._added_tokens_encoder = {token.content: i for i, token in known.items()}
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()


def _has(tokenizer: Any, name: str) -> bool:
    # An unknown word gets the id of another.
    return tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(name)) == name
