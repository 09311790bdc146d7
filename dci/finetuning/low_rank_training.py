"""Keys and values trained as low-rank changes (Hu et al. 2022): W = W_base + u v, with W_base as it is."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dci.concept.concept_file import LowRank
from ldm.attention import KeysValues
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

_UNET = "model.diffusion_model."


class LowRankChanges(nn.Module):
    """The changes of a model's cross-attention keys and values; u starts at zero, so that the first step sees the base."""

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int, seed: int):
        """Make the factors.

        Args:
            shapes: of each weight (rows, columns), by its name in the model.

        Raises:
            UserError: a rank that no weight can have.
        """
        super().__init__()
        most = min(min(shape) for shape in shapes.values())
        if not 1 <= rank <= most:
            raise UserError(f"training.lora_rank={rank}: expected 1 to {most}, the full rank of the smallest weight")
        generator = torch.Generator().manual_seed(seed)
        self.names = list(shapes)
        sizes = shapes.values()
        self.u = nn.ParameterList(nn.Parameter(torch.zeros(rows, rank)) for rows, _ in sizes)
        self.v = nn.ParameterList(
            nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns)) for _, columns in sizes
        )

    def factors(self) -> dict[str, LowRank]:
        """The factors of each weight's change, by its name."""
        return {name: LowRank(u, v) for name, u, v in zip(self.names, self.u, self.v, strict=True)}

    def keys_values(self, model: LatentDiffusion, context: Tensor) -> list[KeysValues]:
        """Return the keys and values of a context (b, l, d) in every cross-attention layer, changes included."""
        factors = self.factors()
        found = []
        for base, layer in zip(model.keys_values(context), model.unet.cross_layers(), strict=True):
            names = (f"{_UNET}{layer.name}.attn2.{which}.weight" for which in ("to_k", "to_v"))
            found.append(KeysValues(*(_added(y, context, factors[name]) for y, name in zip(base, names, strict=True))))
        return found

    @contextmanager
    def merged(self, model: LatentDiffusion) -> Iterator[None]:
        """Put the changed weights into the model for a while."""
        parameters = dict(model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.names}
        with torch.no_grad():
            for name, change in self.factors().items():
                parameters[name].add_((change.u @ change.v).to(parameters[name].dtype))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    parameters[name].copy_(weight)


def _added(base: Tensor, context: Tensor, change: LowRank) -> Tensor:
    """Add what a change makes of a context (b, l, d) to keys or values (b, h, l, d)."""
    rows = F.linear(F.linear(context.to(change.v.dtype), change.v), change.u)
    return base + rows.unflatten(-1, (base.shape[1], -1)).transpose(1, 2).to(base.dtype)
