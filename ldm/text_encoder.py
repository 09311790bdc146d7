"""The text encoders of Stable Diffusion, in three separate steps.

    token ids --embed--> input embeddings --encode--> context

Whoever wants other vectors at some positions puts rows into `embed`'s extra table, or edits the
embeddings between the two steps; the text transformer itself is never patched. Sampling, which comes to the
same prompts again and again, asks for `contexts`, which remembers them.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import tokenizer
from ldm.clip_text import CLIPTextTransformer
from ldm.config import TextEncoderConfig
from ldm.errors import UserError
from ldm.memory import upload
from ldm.remembering import ContextCache, version


class TextEncoder(nn.Module):
    """What both text encoders share; a subclass owns the weights and says what `token_table` and `encode` are."""

    pad_id = tokenizer.END  # the token behind the end token

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        if not 1 <= config.clip_skip <= config.layers:
            raise UserError(f"clip skip {config.clip_skip}: expected 1 (all layers) to {config.layers} (the first alone)")
        self.max_length = config.max_length
        self.depth = config.layers - config.clip_skip + 1  # layers that run
        self.remembered = ContextCache()

    @property
    def token_table(self) -> Tensor:
        """The token embeddings (vocabulary, d), without positions."""
        raise NotImplementedError

    def encode(self, embeddings: Tensor) -> Tensor:
        """Input embeddings (b, l, d) without positions -> context (b, l, d): the last layer that runs, normed."""
        raise NotImplementedError

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids (b, 77) with start, end and padding by end, on the encoder's device.

        What does not fit is cut, with a warning that shows it.
        """
        rows = []
        for prompt in prompts:
            ids = tokenizer.tokenize(prompt)
            if cut := tokenizer.decode(ids[self.max_length - 2 :]):
                warnings.warn(f"the prompt has {len(ids)} tokens, {self.max_length - 2} fit; cut off: '{cut}'", stacklevel=2)
            rows.append(tokenizer.frame(ids, self.max_length))
        return torch.tensor(rows, device=self.token_table.device)

    def embed(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        """Look token ids up, without adding positions.

        Args:
            ids: (b, l), padded with the end token, whatever the encoder pads with; an id beyond the
                vocabulary is a row of `extra`.
            extra: (n, d) further embeddings; gradients reach them.

        Returns:
            (b, l, d).
        """
        table = self.token_table
        ids = self._pad(ids)
        if extra is None:
            return F.embedding(ids, table)
        first = table.shape[0]
        known = F.embedding(ids.clamp(max=first - 1), table)
        added = F.embedding((ids - first).clamp(min=0), extra.to(table.dtype))
        return torch.where((ids < first)[..., None], known, added)

    @torch.no_grad()
    def contexts(self, rows: Sequence[Sequence[int]], extra: Tensor | None = None) -> Tensor:
        """Rows of token ids -> contexts (b, l, d), without gradients.

        A row is encoded once, as long as the weights stay as they are, and by itself: with which others it
        came first makes no difference to it.

        Args:
            extra: (n, d) further embeddings, as for `embed`.
        """
        vocabulary, device = self.token_table.shape[0], self.token_table.device
        further = None if extra is None else extra.detach().float().cpu().numpy().tobytes()

        def encode(key: tuple[tuple[int, ...], bytes | None]) -> Tensor:
            ids = upload(torch.tensor(key[:1]), device)
            return self.encode(self.embed(ids, None if extra is None else upload(extra, device)))[0]

        # Rows without further embeddings do not depend on them.
        keys = [(tuple(row), further if max(row) >= vocabulary else None) for row in rows]
        return torch.stack(self.remembered.get(version(self), keys, encode))

    def _pad(self, ids: Tensor) -> Tensor:
        """Put the encoder's own padding behind the first of the end tokens that a row ends in."""
        if self.pad_id == tokenizer.END:
            return ids
        closing = (ids == tokenizer.END).flip(1).cumprod(1).flip(1).bool()
        padding = F.pad(closing[:, 1:] & closing[:, :-1], (1, 0))
        return ids.masked_fill(padding, self.pad_id)

    def forward(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (b, 77, d)."""
        return self.encode(self.embed(self.tokenize(prompts)))


class CLIPTextEncoder(TextEncoder):
    """CLIP's text transformer under SD 1.x's names (`transformer.text_model.*`)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.text_model = CLIPTextTransformer(config)

    @property
    def token_table(self) -> Tensor:
        return self.transformer.text_model.embeddings.token_embedding.weight

    def encode(self, embeddings: Tensor) -> Tensor:
        return self.transformer.text_model(embeddings, self.depth)


class OpenCLIPTextEncoder(TextEncoder):
    """open_clip's text transformer under SD 2.x's names (`model.transformer.resblocks.*`).

    SD 2.x reads the penultimate layer of ViT-H/14 through the final norm, so that the last of the 24
    layers is never needed: a configuration counts those that are.
    """

    pad_id = 0

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        from open_clip.transformer import LayerNorm, QuickGELU, Transformer  # here: importing open_clip takes seconds

        activations = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
        if config.hidden_act not in activations:
            raise UserError(f"text_encoder.hidden_act={config.hidden_act}: expected one of {', '.join(activations)}")
        self.model = nn.Module()
        self.model.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            mlp_ratio=config.mlp_width / config.width,
            act_layer=activations[config.hidden_act],
            norm_layer=LayerNorm,
        )
        self.model.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.model.positional_embedding = nn.Parameter(torch.zeros(config.max_length, config.width))
        self.model.ln_final = LayerNorm(config.width)

    @property
    def token_table(self) -> Tensor:
        return self.model.token_embedding.weight

    def encode(self, embeddings: Tensor) -> Tensor:
        hidden = embeddings + self.model.positional_embedding[: embeddings.shape[1]]
        causal = _causal_mask(hidden, float("-inf"))
        # Before it took batch_first, open_clip's transformer wanted the positions first.
        batch_first = getattr(self.model.transformer, "batch_first", False)
        hidden = hidden if batch_first else hidden.transpose(0, 1)
        for block in self.model.transformer.resblocks[: self.depth]:
            hidden = block(hidden, attn_mask=causal)
        return self.model.ln_final(hidden if batch_first else hidden.transpose(0, 1))


ENCODERS = {"clip": CLIPTextEncoder, "openclip": OpenCLIPTextEncoder}


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Return the encoder that a configuration describes, with random weights.

    Raises:
        UserError: no such kind, or a clip skip that leaves no layer.
    """
    if config.kind not in ENCODERS:
        raise UserError(f"text_encoder.kind={config.kind}: expected one of {', '.join(ENCODERS)}")
    return ENCODERS[config.kind](config)


def _causal_mask(hidden: Tensor, low: float) -> Tensor:
    """(l, l): 0 where a position may look, `low` where it may not."""
    length = hidden.shape[1]
    return hidden.new_full((length, length), low).triu(1)
