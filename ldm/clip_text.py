"""CLIP's text transformer (Radford et al. 2021, Sec. 2.4) under the names of transformers' CLIPTextModel.

Sampling starts seconds earlier than with transformers itself, whose import takes longer than loading the model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import TextEncoderConfig
from ldm.errors import UserError


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with (Hendrycks & Gimpel 2016, Sec. 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.heads = config.heads
        # In the order of transformers, which fingerprints of models follow.
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, l, d) -> (b, l, d)."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Self-attention and MLP, each residual and pre-normed."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding drawn from N(0, 0.02); without values on the meta device, where drawing takes seconds of imports."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(std=0.02), freeze=False)


class Embeddings(nn.Module):
    """The tables of tokens and of positions."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = _table(config.vocab_size, config.width)
        self.position_embedding = _table(config.max_length, config.width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (b, l, d) -> the same with their positions'."""
        return embeddings + self.position_embedding.weight[: embeddings.shape[1]]


class Encoder(nn.Module):
    """The layers, in a module of their own as transformers has them."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class CLIPTextTransformer(nn.Module):
    """Token embeddings -> hidden states.

    Raises:
        UserError: no such activation.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"text_encoder.hidden_act={config.hidden_act}: expected one of {', '.join(ACTIVATIONS)}")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, embeddings: Tensor, depth: int) -> Tensor:
        """Token embeddings without positions (b, l, d) -> the output of the first `depth` layers, normed (b, l, d)."""
        return self.final_layer_norm(self.hidden(embeddings, depth))

    def hidden(self, embeddings: Tensor, depth: int) -> Tensor:
        """Token embeddings without positions (b, l, d) -> the output of the first `depth` layers, not normed (b, l, d)."""
        hidden = self.embeddings(embeddings)
        for layer in self.encoder.layers[:depth]:
            hidden = layer(hidden)
        return hidden
