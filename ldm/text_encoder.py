"""The CLIP text encoder of Stable Diffusion 1.x, in three separate steps.

    token ids --embed--> input embeddings --encode--> context

Whoever wants other vectors at some positions puts rows into `embed`'s extra table, or edits the
embeddings between the two steps; the text transformer itself is never patched.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm import tokenizer
from ldm.config import TextEncoderConfig


class CLIPTextEncoder(nn.Module):
    """transformers' CLIPTextModel under SD's names (`transformer.text_model.*`)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_length,
                hidden_act=config.hidden_act,
                bos_token_id=tokenizer.START,
                eos_token_id=tokenizer.END,
                attn_implementation="sdpa",
            )
        )
        self.transformer = nn.Module()
        # transformers before version 5 wraps the stack in one module more.
        self.transformer.text_model = getattr(clip, "text_model", clip)
        self.max_length = config.max_length

    @property
    def token_table(self) -> Tensor:
        """The token embeddings (vocabulary, d), without positions."""
        return self.transformer.text_model.embeddings.token_embedding.weight

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids (b, 77) with start, end and padding, on the encoder's device.

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
            ids: (b, l); an id beyond the vocabulary is a row of `extra`, counted from its end.
            extra: (n, d) further embeddings; gradients reach them.

        Returns:
            (b, l, d).
        """
        table = self.token_table
        if extra is None:
            return F.embedding(ids, table)
        first = table.shape[0]
        known = F.embedding(ids.clamp(max=first - 1), table)
        added = F.embedding((ids - first).clamp(min=0), extra.to(table.dtype))
        return torch.where((ids < first)[..., None], known, added)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Input embeddings (b, l, d) without positions -> context (b, l, d): the last layer, normed."""
        text = self.transformer.text_model
        hidden = text.embeddings(inputs_embeds=embeddings)
        length = hidden.shape[1]
        causal = hidden.new_full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        hidden = text.encoder(inputs_embeds=hidden, attention_mask=causal).last_hidden_state
        return text.final_layer_norm(hidden)

    def forward(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (b, 77, d)."""
        return self.encode(self.embed(self.tokenize(prompts)))
