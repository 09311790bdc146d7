"""Scores of the field, from features: CLIP-T, CLIP-I, DINO-I, and KID.

All take features as encoders give them and bring them to unit length where the score asks for it; KID takes them as
they are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dci.evaluation.bootstrap import Interval, factors, percentile_interval, weights
from ldm.errors import UserError
from ldm.noise import fitting_seed

CLIP_T, CLIP_T_SCALED, CLIP_I, DINO_I, KID = "clip_t", "clip_t_w2.5", "clip_i", "dino_i", "kid"
NOUN, PLACE = "noun", "place"

LABELS = {
    CLIP_T: "CLIP-T",
    CLIP_T_SCALED: "CLIP-T × 2.5",
    CLIP_I: "CLIP-I",
    DINO_I: "DINO-I",
    NOUN: "noun right",
    PLACE: "place right",
    KID: "KID",
}
"""Metric -> how tables and plots name it."""


def text_scores(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: cosine of each image's embedding and its prompt's.

    Args:
        images, texts: (n, d).

    Returns:
        (n), in [-1, 1].
    """
    return F.cosine_similarity(images, texts, dim=-1)


def scaled_text_scores(cosines: Tensor) -> Tensor:
    """Text score as Custom Diffusion reports it, 2.5 max(cos, 0): CLIPScore (Hessel et al. 2021, Eq. 1)."""
    return 2.5 * cosines.clamp(min=0)


def image_scores(images: Tensor, references: Tensor) -> Tensor:
    """CLIP-I and DINO-I: mean cosine of each image's embedding to those of the reference images.

    Args:
        images: (n, d).
        references: (m, d).

    Returns:
        (n), in [-1, 1].
    """
    return (F.normalize(images, dim=-1) @ F.normalize(references, dim=-1).T).mean(-1)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x.y / d + 1)^3 (Binkowski et al. 2018): (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(real: Tensor, fake: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy with KID's kernel.

    Args:
        real: (n, d), n at least 2.
        fake: (m, d), m at least 2.
    """
    return _within(real) + _within(fake) - 2 * polynomial_kernel(real, fake).mean()


def _within(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different rows."""
    kernel, n = polynomial_kernel(x, x), len(x)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


class Kid(NamedTuple):
    """Kernel Inception Distance over random subsets."""

    mean: float
    std: float  # over the subsets, not an error of the mean
    subset_size: int


def kid(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """KID, a squared distance that is 0 on average for two samples of one distribution and may be below.

    The subsets are drawn without replacement, those of the real images first, in torchmetrics' order: with
    `torch.manual_seed(seed)` before its `compute()`, its subsets are the same.

    Args:
        real: features of real images (n, d).
        fake: features of generated images (m, d).
        subset_size: of which no more is taken than the smaller set has.

    Raises:
        UserError: a set has fewer than two images.
    """
    subset_size = min(subset_size, len(real), len(fake))
    if subset_size < 2:
        raise UserError(f"KID of {len(real)} real and {len(fake)} generated images: expected 2 or more of each")
    generator, real, fake = torch.Generator().manual_seed(fitting_seed(seed, 64)), real.double().cpu(), fake.double().cpu()
    values = []
    for _ in range(subsets):
        part = real[torch.randperm(len(real), generator=generator)[:subset_size]]
        values.append(mmd2(part, fake[torch.randperm(len(fake), generator=generator)[:subset_size]]))
    across = torch.stack(values)
    return Kid(across.mean().item(), across.std(correction=0).item(), subset_size)


def kid_interval(
    real: Tensor, fake: Tensor, columns: Mapping[str, Sequence[str]], value: Kid, resamples: int, seed: int
) -> Interval:
    """Return KID with its bootstrap interval over the generated images' prompts and seeds; the real ones stay.

    Each resample is the weighted unbiased estimate from all images. An image drawn twice is never paired
    with itself, which would take it for two images that are alike.

    Args:
        columns: factors that the generated images belong to, see `dci.evaluation.bootstrap.factors`.
    """
    real, fake = real.double().cpu(), fake.double().cpu()
    cross = polynomial_kernel(fake, real).mean(1).numpy()
    pairs = polynomial_kernel(fake, fake).fill_diagonal_(0).numpy()
    own, sums, totals = _within(real).item(), [], []
    for w in weights(factors(columns), resamples, seed):
        total = w.sum(1)
        number = total**2 - (w**2).sum(1)  # of pairs
        some = number > 0
        w, total, number = w[some], total[some], number[some]
        sums.append(own + ((w @ pairs) * w).sum(1) / number - 2 * (w @ cross) / total)
        totals.append(np.ones(len(w)))
    return percentile_interval(value.mean, np.concatenate(sums), np.concatenate(totals), len(fake))
