"""DBIM, the dual-branch integration module (Sec. 3.3): cross-attention while both branches run."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dci.concept.prompts import BranchPrompts
from ldm.attention import Attend, attend, attention_maps
from ldm.runtime.device_memory import upload
from ldm.unet import CrossLayer

GAIN, GAIN_PIXELS = 500.0, 4096
"""The authors' gain, and the pixels of the finest cross-attention layer that it was made for: Stable Diffusion at 512 px."""

FINETUNED, BASE = "finetuned", "base"
"""What `DualBranch.auxiliary_weights` can be."""

Observe = Callable[[Tensor, Tensor, Tensor], None]
"""Gets w_c (b, h, n), and the attention maps A of the concept rows and B of the auxiliary rows (b, h, n, l)."""


@dataclass(frozen=True)
class DualBranch:
    """How DCI divides and integrates; the defaults are the authors', for Stable Diffusion."""

    agg_time: float = 0.3  # T_a: share of the training timesteps, from the noisy end, with both branches
    agg_lambda: float = 0.0  # weight of the auxiliary branch's logits, typically -2 to 2
    gain: float = GAIN  # factor on the normalised evidence, see `calibrated_gain`
    token_sharpness: float = 10.0  # factor on attention maps before the softmax over a prompt's tokens
    pixel_sharpness: float = 10.0  # factor on evidence before the softmax over a layer's pixels
    shared_guidance: bool = True  # guide the auxiliary branch with the concept branch's unconditional output
    shared_noise: bool = False  # both branches start from the same noise; otherwise each from its own
    layers: tuple[str, ...] | None = None  # where the branches are integrated, see layer_selection.py; None: everywhere
    auxiliary_weights: str = FINETUNED  # keys and values of the auxiliary branch: finetuned, or the base model's

    def is_dual(self, t: int, timesteps: int = 1000) -> bool:
        """Whether both branches run at training timestep t."""
        return t / timesteps > 1 - self.agg_time


def calibrated_gain(layers: list[CrossLayer], latent: tuple[int, int]) -> float:
    """Return the gain that mixes as the authors' does, whatever a model's layers and the size of the image.

    Evidence is normalised over a layer's pixels, so the gain grows with those of the finest layer: 500 for the
    4096 of Stable Diffusion at 512 px, 1125 for the 9216 at 768 px.

    Args:
        layers: the model's cross-attention layers.
        latent: height and width of the latents, in cells.
    """
    finest = min(layer.factor for layer in layers)
    return GAIN * (latent[0] // finest) * (latent[1] // finest) / GAIN_PIXELS


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens behind the start token count, and which are named, each a bool tensor.

    Rows may belong to different prompts; the width is the longest prompt's length, or more.
    """

    concept_counts: Tensor  # (b, L_c)
    concept: Tensor  # M_c (b, L_c)
    auxiliary_counts: Tensor  # (b, L_a)
    auxiliary: Tensor  # M_a (b, L_a)

    @staticmethod
    def of(prompts: list[BranchPrompts], device: torch.device | str = "cpu", width: int = 0) -> "TokenMasks":
        """Collect the positions and lengths of a batch of prompts.

        Args:
            width: of all masks, at least: compiled graphs want one width for all prompts.
        """

        def mask(positions: list[Sequence[int]], width: int) -> Tensor:
            rows = torch.zeros(len(positions), width, dtype=torch.bool)
            for row, places in zip(rows, positions, strict=True):
                row[list(places)] = True
            return upload(rows, device)

        concept_width = max(width, *(p.concept_length for p in prompts))
        auxiliary_width = max(width, *(p.auxiliary_length for p in prompts))
        return TokenMasks(
            mask([range(p.concept_length) for p in prompts], concept_width),
            mask([p.concept_positions for p in prompts], concept_width),
            mask([range(p.auxiliary_length) for p in prompts], auxiliary_width),
            mask([p.auxiliary_positions for p in prompts], auxiliary_width),
        )


def concept_weight(concept_maps: Tensor, auxiliary_maps: Tensor, masks: TokenMasks, dual: DualBranch) -> Tensor:
    """Weight of the concept branch at every head and pixel (Sec. 3.3).

    Args:
        concept_maps: softmaxed cross-attention maps A of the concept rows (b, h, n, l); token 0 is the start.
        auxiliary_maps: maps B of the auxiliary rows, likewise.

    Returns:
        w_c (b, h, n) in [0, 1]; the auxiliary branch's weight is 1 - w_c.
    """
    concept, _ = _shares(concept_maps, masks.concept_counts, masks.concept, dual.token_sharpness)
    _, other = _shares(auxiliary_maps, masks.auxiliary_counts, masks.auxiliary, dual.token_sharpness)
    concept, other = (dual.gain * torch.softmax(dual.pixel_sharpness * x, dim=-1) for x in (concept, other))
    # softmax([concept, lambda other]) over the two branches.
    return torch.sigmoid(concept - dual.agg_lambda * other)


def _shares(maps: Tensor, counts: Tensor, named: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return how much of a pixel's sharpened attention the named tokens have, and all others: (b, h, n) each."""
    counts, named = counts[:, None, None], named[:, None, None]
    logits = (sharpness * maps[..., 1 : 1 + counts.shape[-1]]).masked_fill(~counts, float("-inf"))
    shares = logits.softmax(dim=-1)
    share = (shares * named).sum(dim=-1)
    # The gain magnifies rounding: the published arithmetic subtracts here, and so do we.
    return share, shares.sum(dim=-1) - share


def integrating_attend(
    masks: TokenMasks, dual: DualBranch, concept: slice, auxiliary: slice, observe: Observe | None = None
) -> Attend:
    """Return attention whose concept rows are integrated with the auxiliary rows.

    Args:
        masks: of the concept rows' prompts, in their order.
        concept, auxiliary: which rows of the batch belong to the branches; others are left as they are.
        observe: shown what the integration works with.
    """

    # An observer gets the maps from the plain version; the fused one never makes them.
    kernels = fused_kernels(masks.concept.device) if observe is None else None

    def integrate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        if kernels is not None:
            kernels.integrate(out, q, k, masks, dual, concept, auxiliary)
            return out
        # The gain magnifies rounding, so the weights are worked out in full precision.
        of_concept, of_auxiliary = (attention_maps(q[rows].float(), k[rows].float()) for rows in (concept, auxiliary))
        weight = concept_weight(of_concept, of_auxiliary, masks, dual)
        if observe is not None:
            observe(weight, of_concept, of_auxiliary)
        weight = weight[..., None].to(out.dtype)
        out[concept] = weight * out[concept] + (1 - weight) * out[auxiliary]
        return out

    return integrate


def fused_kernels(device: torch.device) -> ModuleType | None:
    """Return `dci.dual_branch.integration_triton` for a GPU where Triton is installed; None: the arithmetic above serves."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("dci.dual_branch.integration_triton")
