"""The text encoders of Stable Diffusion, in three separate steps.

    token ids --embed--> input embeddings --encode--> context

To have other vectors at some positions, put rows into `embed`'s extra table, or edit the
embeddings between the two steps; the text transformer itself is never patched.

What the UNet is to read comes as a `Conditioning`, in every family alike: from `condition` with gradients, for
training, and from `conditions` and `negative` without, for sampling, which comes to the same prompts again and
again: those are remembered.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import tokenizer
from ldm.clip_text import CLIPTextTransformer
from ldm.conditioning import Conditioning
from ldm.config import TextEncoderConfig
from ldm.context_cache import ContextCache, version
from ldm.errors import UserError
from ldm.runtime.device_memory import upload


class TextEncoder(nn.Module):
    """What all text encoders share; a subclass owns the weights and defines `token_table` and `encode`."""

    pad_id = tokenizer.END  # the token behind the end token

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        if not 1 <= config.clip_skip <= config.layers:
            raise UserError(f"clip skip {config.clip_skip}: expected 1 (all layers) to {config.layers} (the first alone)")
        self.max_length = config.max_length
        self.depth = config.layers - config.clip_skip + 1  # layers that the context is read behind
        self.final_norm = config.final_norm
        self.remembered = ContextCache()

    @property
    def token_table(self) -> Tensor:
        """The token embeddings (vocabulary, d), without positions."""
        raise NotImplementedError

    @property
    def token_tables(self) -> list[Tensor]:
        """The tables whose rows stand beside each other in an input embedding; one, as a rule."""
        return [self.token_table]

    def encode(self, embeddings: Tensor) -> Tensor:
        """Input embeddings (b, l, d) without positions -> context (b, l, d): the last layer that runs, normed."""
        raise NotImplementedError

    def encode_pooled(self, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input embeddings and their token ids (b, l) -> context, and the pooled text (b, p) where there is one."""
        return self.encode(embeddings), None

    def vector(self, pooled: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        """Pooled texts (b, p) and image sizes (b or 1, 6) -> what is added to the timestep (b, v); None: nothing is."""
        return None

    def condition(self, ids: Tensor, extra: Tensor | None = None, sizes: Tensor | None = None) -> Conditioning:
        """Token ids (b, l) -> what the UNet reads; gradients reach `extra`.

        Args:
            extra: (n, d) further embeddings, as for `embed`.
            sizes: `ImageSize.row` of each image (b, 6), or one for all; read where there is a vector.
        """
        context, pooled = self.encode_pooled(self.embed(ids, extra), ids)
        return Conditioning(context, self.vector(pooled, sizes))

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
        return torch.tensor(rows, device=self.token_tables[0].device)

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
        if extra is None or not len(extra):  # a concept named by words of the vocabulary has none
            return F.embedding(ids, table)
        first = table.shape[0]
        known = F.embedding(ids.clamp(max=first - 1), table)
        added = F.embedding((ids - first).clamp(min=0), extra.to(table.dtype))
        return torch.where((ids < first)[..., None], known, added)

    def contexts(self, rows: Sequence[Sequence[int]], extra: Tensor | None = None) -> Tensor:
        """Rows of token ids -> contexts (b, l, d), without gradients, as `conditions` has them."""
        return self._remembered(rows, extra)[0]

    def conditions(
        self, rows: Sequence[Sequence[int]], extra: Tensor | None = None, sizes: Tensor | None = None
    ) -> Conditioning:
        """Rows of token ids -> what the UNet reads, without gradients.

        Args:
            extra, sizes: as for `condition`.
        """
        context, pooled = self._remembered(rows, extra)
        return Conditioning(context, self.vector(pooled, sizes))

    def negative(self, prompt: str, number: int, sizes: Tensor | None = None) -> Conditioning:
        """What guidance leads away from, in `number` equal rows."""
        return self.conditions(self.tokenize([prompt]).tolist() * number, None, sizes)

    @torch.no_grad()
    def _remembered(self, rows: Sequence[Sequence[int]], extra: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of token ids -> contexts (b, l, d) and pooled texts (b, p), if any.

        A row is encoded once, as long as the weights stay as they are, and by itself: with which others it
        came first makes no difference to it.

        Args:
            extra: (n, d) further embeddings, as for `embed`.
        """
        vocabulary, device = tokenizer.VOCAB_SIZE, self.token_tables[0].device
        further = None if extra is None else extra.detach().float().cpu().numpy().tobytes()

        def encode(key: tuple[tuple[int, ...], bytes | None]) -> tuple[Tensor, Tensor | None]:
            ids = upload(torch.tensor(key[:1]), device)
            context, pooled = self.encode_pooled(self.embed(ids, None if extra is None else upload(extra, device)), ids)
            return context[0], None if pooled is None else pooled[0]

        # Rows without further embeddings do not depend on them.
        keys = [(tuple(row), further if max(row) >= vocabulary else None) for row in rows]
        contexts, pooled = zip(*self.remembered.get(version(self), keys, encode), strict=True)
        return torch.stack(contexts), None if pooled[0] is None else torch.stack(pooled)

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

    transformer: Any  # holds the network under SD's names

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.text_model = CLIPTextTransformer(config)

    @property
    def token_table(self) -> Tensor:
        return self.transformer.text_model.embeddings.token_embedding.weight

    def encode(self, embeddings: Tensor) -> Tensor:
        text_model = self.transformer.text_model
        return text_model(embeddings, self.depth) if self.final_norm else text_model.hidden(embeddings, self.depth)


class OpenCLIPTextEncoder(TextEncoder):
    """open_clip's text transformer under SD 2.x's names (`model.transformer.resblocks.*`).

    SD 2.x reads the penultimate layer of ViT-H/14 through the final norm, so that the last of the 24
    layers is never needed: a configuration counts those that are. SDXL reads the penultimate layer of ViT-bigG/14
    without that norm, and pools the last one.
    """

    pad_id = 0
    model: Any  # holds the networks under SD's names

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
        if config.projection:
            self.model.text_projection = nn.Parameter(torch.zeros(config.width, config.projection))

    @property
    def token_table(self) -> Tensor:
        return self.model.token_embedding.weight

    def encode(self, embeddings: Tensor) -> Tensor:
        return self._context(self._layers(embeddings, self.depth)[-1])

    def encode_pooled(self, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if not hasattr(self.model, "text_projection"):
            return self.encode(embeddings), None
        before, last = self._layers(embeddings, self.depth, len(self.model.transformer.resblocks))
        # By its id: learned tokens have larger ones, and so the largest is not the end.
        end = (ids == tokenizer.END).int().argmax(dim=1)
        at_end = last[torch.arange(len(last), device=last.device), end]
        return self._context(before), self.model.ln_final(at_end) @ self.model.text_projection

    def _context(self, hidden: Tensor) -> Tensor:
        return self.model.ln_final(hidden) if self.final_norm else hidden

    def _layers(self, embeddings: Tensor, *depths: int) -> list[Tensor]:
        """Return the hidden states (b, l, d) behind so many layers, for each of the given numbers."""
        hidden = embeddings + self.model.positional_embedding[: embeddings.shape[1]]
        causal = _causal_mask(hidden, float("-inf"))
        # Before it took batch_first, open_clip's transformer wanted the positions first.
        batch_first = getattr(self.model.transformer, "batch_first", False)
        hidden = hidden if batch_first else hidden.transpose(0, 1)
        states = {0: hidden}
        for number, block in enumerate(self.model.transformer.resblocks[: max(depths)], 1):
            states[number] = hidden = block(hidden, attn_mask=causal)
        return [states[depth] if batch_first else states[depth].transpose(0, 1) for depth in depths]


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
