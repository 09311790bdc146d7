"""The files of DCI_ICO, `embeddings_gs-*.ckpt`: keys and values, and the whole token table with new rows at its end."""

from collections.abc import Mapping

from torch import Tensor

from dci.concept.foreign.content import Content
from dci.concept.foreign.layers import UNET
from ldm.errors import UserError
from ldm.tokenizer import VOCAB_SIZE

TABLE = "transformer.text_model.embeddings.token_embedding.weight"
_PARTS = ("input_blocks.", "middle_block.", "output_blocks.")


def state_of(content: dict) -> dict | None:
    """Return the state dict in such a file's content; None for any other file."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or TABLE not in state:
        return None
    return dict(state) if all(str(name).startswith(_PARTS) for name in state if name != TABLE) else None


def read(state: dict, source: str) -> Content:
    """Return keys and values and the last rows of the token table.

    Raises:
        UserError: the table has no rows of new tokens.
    """
    table = state.pop(TABLE)
    if not isinstance(table, Tensor) or table.ndim != 2 or len(table) <= VOCAB_SIZE:
        raise UserError(f"{source} has no rows for new tokens in its token table: expected more than {VOCAB_SIZE}")
    weights = {UNET + name: weight.detach() for name, weight in state.items() if isinstance(weight, Tensor)}
    new = len(table) - VOCAB_SIZE
    said = f"of its token table the last {new} rows are taken; the rows of ordinary words, which decay in training, are not"
    contexts = "its image-specific contexts are not in this file, and sampling needs none"
    return Content(
        "DCI_ICO's embeddings", weights=weights, tokens=(table.detach()[VOCAB_SIZE:].clone(),), said=(said, contexts)
    )
