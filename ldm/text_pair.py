"""SDXL's two text encoders as one (Podell et al. 2023, Sec. 2.1): contexts beside each other, and a pooled text.

An input embedding is a pair, (768 | 1280) in SDXL itself, so that one id stands for both halves of a learned token.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ldm import tokenizer
from ldm.conditioning import Conditioning
from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.text_encoder import TextEncoder, build_text_encoder
from ldm.unet import timestep_embedding

SIZES = 6  # numbers of an image's size condition


class PairedTextEncoder(TextEncoder):
    """Two text encoders under SDXL's names (`embedders.0.*`, `embedders.1.*`); the second one pools."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.text_encoder)
        assert config.text_encoder_2 is not None, "a pair needs a second encoder"
        first, second = build_text_encoder(config.text_encoder), build_text_encoder(config.text_encoder_2)
        self.embedders = nn.ModuleList([first, second])
        self.size_width = _size_width(config.unet.adm_in_channels or 0, config.text_encoder_2.projection or 0)
        self.zeros_for_empty_negative = config.zeros_for_empty_negative

    @property
    def pair(self) -> tuple[TextEncoder, TextEncoder]:
        """The two encoders."""
        first, second = self.embedders
        return cast(TextEncoder, first), cast(TextEncoder, second)

    @property
    def token_table(self) -> Tensor:
        """Not defined for a pair: use `token_tables`."""
        raise NotImplementedError("see token_tables")

    @property
    def token_tables(self) -> list[Tensor]:
        """CLIP's and OpenCLIP's, whose rows stand beside each other."""
        return [encoder.token_table for encoder in self.pair]

    def embed(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        """Look token ids up in both tables, each row padded as its encoder has it: (b, l, d_1 + d_2)."""
        halves = [None, None] if extra is None else self._split(extra)
        return torch.cat([encoder.embed(ids, half) for encoder, half in zip(self.pair, halves, strict=True)], dim=-1)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Input embeddings (b, l, d_1 + d_2) without positions -> contexts beside each other, of the same shape."""
        halves = self._split(embeddings)
        return torch.cat([encoder.encode(half) for encoder, half in zip(self.pair, halves, strict=True)], dim=-1)

    def encode_pooled(self, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input embeddings and their token ids (b, l) -> contexts beside each other, and the second's pooled text."""
        first, second = self._split(embeddings)
        context, pooled = self.pair[1].encode_pooled(second, ids)
        return torch.cat([self.pair[0].encode(first), context], dim=-1), pooled

    def vector(self, pooled: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        """[pooled text | sinusoids of original height and width, crop top and left, target height and width]."""
        if pooled is None or sizes is None:
            raise ValueError("this family is conditioned on the image's size: hand it on as sizes")
        sinusoids = timestep_embedding(sizes.to(pooled.device).flatten(), self.size_width).view(len(sizes), -1)
        return torch.cat([pooled, sinusoids.expand(len(pooled), -1).to(pooled)], dim=-1)

    def negative(self, prompt: str, number: int, sizes: Tensor | None = None) -> Conditioning:
        """As in every family; but an empty prompt is zeros, in context and pooled text, where the model has it so."""
        context, pooled = self._remembered(self.tokenize([prompt]).tolist() * number)
        if self.zeros_for_empty_negative and not tokenizer.tokenize(prompt):
            context, pooled = torch.zeros_like(context), torch.zeros_like(cast(Tensor, pooled))
        return Conditioning(context, self.vector(pooled, sizes))

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([table.shape[1] for table in self.token_tables], dim=-1)


def _size_width(vector: int, pooled: int) -> int:
    """Width of each of the sinusoids that the vector has behind the pooled text."""
    width, rest = divmod(vector - pooled, SIZES)
    if not pooled or width < 2 or width % 2 or rest:
        raise UserError(
            f"unet.adm_in_channels={vector}: expected text_encoder_2.projection ({pooled}) and six even widths for the "
            "image's size, such as 1280 + 6 x 256 = 2816"
        )
    return width
