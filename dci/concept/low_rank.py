"""Low-rank concept files: the change of each weight as a product of two thin matrices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dci.concept.concept_file import Concept, LowRank
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Compression:
    """A concept with low-rank changes, and what that has cost."""

    concept: Concept
    ranks: dict[str, int]
    error: float  # |change - u v| / |change|, Frobenius norms over all weights together
    worst: tuple[str, float]  # the weight whose own error is largest
    megabytes: float  # of all that the file will hold: factors, biases, tokens and contexts

    def describe(self) -> str:
        """Return the ranks, the size and the error in one line."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"low-rank change: {ranks}, {self.megabytes:.2f} MB; reconstruction error {self.error:.4f} of the change, "
            f"at most {self.worst[1]:.4f} ({self.worst[0]})"
        )


def factors(change: Tensor, rank: int) -> LowRank:
    """The best approximation of a rank (Eckart & Young 1936), the scale shared evenly by both factors.

    A convolution's change (out, in, h, w) is taken as a matrix of `out` rows.
    """
    u, s, v = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(u[:, :rank] * root, (root[:, None] * v[:rank]).view(-1, *change.shape[1:]))


def product_factors(a: Tensor, b: Tensor) -> LowRank:
    """The product a b (rows, n) (n, columns) again, its scale shared evenly by both factors."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b.T)
    core = factors(ra @ rb.T, min(len(ra), len(rb)))
    return LowRank(qa @ core.u, core.v @ qb.T)


def compress(
    concept: Concept,
    model: LatentDiffusion,
    rank: int | None = None,
    energy: float | None = None,
    most_megabytes: float = 10.0,
) -> Compression:
    """Replace a concept's weights by low-rank changes in fp16.

    Args:
        model: the base model, without the concept.
        rank: of every change; or
        energy: share of each change's squared singular values that is kept, 0 to 1.
        most_megabytes: that the concept may take.

    Raises:
        UserError: the concept is of another base or has no weights, an option is out of range, or it takes too much.
    """
    concept.check_base(model)
    base, weights = model.state_dict(), concept.weights(model)
    if all(weight.dim() < 2 for weight in weights.values()):
        raise UserError("the concept has no weights to compress: only its tokens were trained")
    if (rank is None) == (energy is None):
        raise UserError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy}: expected a share above 0, at most 1")
    changes = {name: weight - base[name].float().cpu() for name, weight in weights.items()}
    whole = {name: weights[name].half() for name, change in changes.items() if change.dim() < 2}  # biases
    ranks = {n: _rank(c, rank, energy) for n, c in changes.items() if n not in whole}
    rest = sum(t.nbytes for t in (concept.modifiers, concept.prefixes, concept.suffixes, *whole.values()))
    megabytes = (2 * sum(r * sum(_matrix(changes[n])) for n, r in ranks.items()) + rest) / MEGABYTE
    if megabytes > most_megabytes:
        asked = f"rank {rank}" if rank is not None else f"energy {energy}"
        raise UserError(
            f"{asked} takes {megabytes:.1f} MB, over the limit of {most_megabytes:g} MB: give a smaller one, "
            "or a higher most_megabytes="
        )
    low_rank = {n: LowRank(*(f.half() for f in factors(changes[n], r))) for n, r in ranks.items()}
    squares = {n: ((changes[n] - f.product()).square().sum(), changes[n].square().sum()) for n, f in low_rank.items()}
    errors = {n: (wrong / total.clamp(min=1e-30)).sqrt().item() for n, (wrong, total) in squares.items()}
    wrong, total = (sum(values) for values in zip(*squares.values(), strict=True))
    worst = max(errors, key=errors.__getitem__)
    return Compression(
        replace(concept, keys_values=whole, low_rank=low_rank, changes={}),
        ranks,
        (wrong / total.clamp(min=1e-30)).sqrt().item(),
        (worst, errors[worst]),
        megabytes,
    )


def _rank(change: Tensor, rank: int | None, energy: float | None) -> int:
    if rank is not None:
        return min(rank, *_matrix(change))
    kept = torch.linalg.svdvals(change.double().flatten(1)).square().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1 if kept[-1] > 0 else 1


def _matrix(change: Tensor) -> tuple[int, int]:
    """Rows and columns of a change as a matrix."""
    return len(change), change[0].numel()
