"""DCI sampling (Sec. 3.3): an early phase with two branches, then the concept branch alone.

Both phases are the same solver. In the early one its state is the two branches' latents, stacked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dci.concept.concept_file import Concept
from dci.concept.prompts import BranchPrompts, negative_ids
from dci.dual_branch.attention_maps import MapsCallback, observer
from dci.dual_branch.integration import BASE, DualBranch, TokenMasks, integrating_attend
from dci.dual_branch.layer_selection import check_layers, integrated_layers
from ldm.attention import Attend, attend
from ldm.conditioning import Conditioning, concatenated
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.init_image import InitImage, begin
from ldm.noise import ImageNoise
from ldm.runtime.decoding import decode
from ldm.sampling_loop import Callback, Denoise, Noise, guide, solve, timestep_rows
from ldm.text_to_image import SamplingOptions, check_options, guided, make_solver, per_image

Weights = dict[str, Tensor]
"""Matrices by their names in a Stable Diffusion checkpoint."""


@dataclass(frozen=True)
class BranchContexts:
    """What the UNet reads in a batch: text contexts, each (b, 77, d), and vectors (b, v) in families that have them."""

    unconditional: Tensor
    concept: Tensor
    auxiliary: Tensor
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)  # in the same order

    @staticmethod
    def of(
        model: LatentDiffusion,
        concept: Concept,
        prompts: list[BranchPrompts],
        negative: str = "",
        sizes: Tensor | None = None,
    ) -> "BranchContexts":
        """Encode a batch's prompts, the modifier tokens with the concept's embeddings.

        Args:
            sizes: the sizes of the images that the model is conditioned on (1, 6), see `ldm.conditioning.ImageSize`.
        """
        text = model.text_encoder
        rows = [*(p.concept_ids for p in prompts), *(p.auxiliary_ids for p in prompts)]
        own, other = text.conditions(rows, concept.modifiers, sizes).chunk(2)
        named = negative_ids(negative, concept.names)
        if named is None:
            nothing = text.negative(negative, len(prompts), sizes)
        else:
            nothing = text.conditions([named] * len(prompts), concept.modifiers, sizes)
        vectors = (nothing.vector, own.vector, other.vector)
        return BranchContexts(nothing.tensor, own.tensor, other.tensor, vectors)

    def conditionings(self) -> tuple[Conditioning, Conditioning, Conditioning]:
        """Contexts and vectors together: unconditional, concept, auxiliary."""
        nothing, own, other = self.vectors
        return (
            Conditioning(self.unconditional, nothing),
            Conditioning(self.concept, own),
            Conditioning(self.auxiliary, other),
        )


def dual_guided(
    model: LatentDiffusion,
    contexts: BranchContexts,
    masks: TokenMasks,
    dual: DualBranch,
    scale: float,
    latent: tuple[int, int],
    base: Weights | None = None,
    maps: MapsCallback | None = None,
) -> Denoise:
    """Return denoise(state, t) for both branches, in one UNet call per step.

    The state is (2, b, c, h, w): concept branch, auxiliary branch. With shared guidance the rows
    are [unconditional, concept, auxiliary]; with separate guidance [unconditional, concept,
    unconditional, auxiliary]; without guidance (scale 1) [concept, auxiliary].

    Args:
        latent: height and width of the latents.
        base: keys and values of the auxiliary branch's rows; None: the model's.
        maps: shown what each layer's integration sees.
    """
    b = len(contexts.concept)
    nothing, own, other = contexts.conditionings()
    rows = [(0, nothing), (0, own), (1, nothing), (1, other)]
    if scale == 1:
        rows = [rows[1], rows[3]]
    elif dual.shared_guidance:
        rows = [rows[0], rows[1], rows[3]]
    branch_of_row = [branch for branch, _ in rows]
    text = concatenated([model.read(context, base if branch else None) for branch, context in rows])
    concept = slice(0, b) if scale == 1 else slice(b, 2 * b)
    auxiliary = slice((len(rows) - 1) * b, len(rows) * b)
    integrate = integrating_attend(masks, dual, concept, auxiliary)
    layers = list(enumerate(model.unet.cross_layers()))
    chosen = integrated_layers(model.unet, dual.layers, latent)

    def attends(t: int) -> list[Attend]:
        if maps is None:
            return [integrate if on else attend for on in chosen]
        watching = [observer(maps, t, number, layer, masks, latent) for number, layer in layers]
        return [
            integrating_attend(masks, dual, concept, auxiliary, observe) if on else attend
            for on, observe in zip(chosen, watching, strict=True)
        ]

    def denoise(state: Tensor, t: int) -> Tensor:
        x = state[branch_of_row].flatten(0, 1)
        output = model.predict(x, timestep_rows(t, x), text, attends(t)).chunk(len(rows))
        if scale == 1:
            return torch.stack(output)
        unconditional_of_auxiliary = output[0] if dual.shared_guidance else output[2]
        return torch.stack([guide(output[0], output[1], scale), guide(unconditional_of_auxiliary, output[-1], scale)])

    return denoise


def sample_latents(
    model: LatentDiffusion,
    contexts: BranchContexts,
    masks: TokenMasks,
    dual: DualBranch | None,
    options: SamplingOptions,
    noises: tuple[Noise, Noise],
    callback: Callback | None = None,
    init: InitImage | None = None,
    base: Weights | None = None,
    maps: MapsCallback | None = None,
) -> Tensor:
    """Denoise a batch from its first noise to its latents (b, c, h, w).

    Args:
        dual: None samples the concept's prompt plainly.
        noises: of the concept branch and of the auxiliary branch, which never share numbers but their
            first where `dual.shared_noise` says so, so that the concept branch sees the same noise with
            DCI and without.
        callback: called after each step; in the early phase its tensors hold both branches, stacked.
        base: the base model's keys and values, for the auxiliary branch; None: the model's own.
        maps: shown the branch weights and attention maps while both branches run.
    """
    solver = make_solver(model, options, init)
    dual_steps = sum(dual.is_dual(t, len(solver.alphas_cumprod)) for t in solver.timesteps) if dual else 0

    # The concept branch's first noise is drawn once, so that both phases keep the same parts of an image.
    first, history = noises[0](), None
    x, after = begin(init, solver, first)

    # Divide and conquer: both branches.
    if dual is not None and dual_steps:
        height, width = first.shape[-2:]
        denoise = dual_guided(model, contexts, masks, dual, options.scale, (height, width), base, maps)
        state, after_both = begin(init, solver, torch.stack([first, first if dual.shared_noise else noises[1]()]))
        state, history = solve(
            solver,
            denoise,
            state,
            range(dual_steps),
            noise=lambda: torch.stack([noise() for noise in noises]),
            after=after_both,
            callback=callback,
        )
        x, history = state[0], solver.branch(history, 0)

    # The concept alone.
    nothing, own, _ = contexts.conditionings()
    denoise = guided(model, nothing, own, options.scale)
    rest = range(dual_steps, len(solver.timesteps))
    return solve(solver, denoise, x, rest, history, noise=noises[0], after=after, callback=callback)[0]


@dataclass(frozen=True)
class SampleRequest:
    """A batch of images to sample with a concept."""

    prompts: BranchPrompts | list[BranchPrompts]  # one for all images, or one for each
    indices: list[int]  # an image depends on its prompt, its seed and its index, not on the batch it is made in
    options: SamplingOptions
    dual: DualBranch | None = None  # DCI's settings; None is plain sampling of the fine-tuned model
    negative: str = ""  # what guidance leads away from, in both branches; may name the concept
    init: InitImage | None = None  # the image that both branches start from; None starts from noise alone
    base: Weights | None = None  # what the concept replaced (`Concept.replaced`), where `dual.auxiliary_weights` is base
    seeds: list[int] | None = None  # each image's seed; None: the options' for all


@dataclass(frozen=True)
class Observers:
    """Functions that are called while images are sampled."""

    callback: Callback | None = None  # after each step, see `ldm.sampling_loop`; early tensors hold both branches, stacked
    maps: MapsCallback | None = None  # each integrated layer while both branches run, see `dci.dual_branch.attention_maps`


@torch.inference_mode()
def sample(model: LatentDiffusion, concept: Concept, request: SampleRequest, observers: Observers | None = None) -> Tensor:
    """Sample a batch of images with a concept.

    Args:
        model: the base model with the concept applied (`Concept.apply`).

    Returns:
        (b, 3, height, width) in [-1, 1].

    Raises:
        UserError: options that the model cannot be sampled with, layers that it does not have, or
            the base model's weights are asked for and not given.
    """
    options, dual, init, seen = request.options, request.dual, request.init, observers or Observers()
    check_options(model, options)
    prompts, base = per_image(request.prompts, request.indices), None
    shape = model.latent_shape(options.height, options.width)
    if dual is not None:
        check_layers(model, options, dual.layers)
        base = _auxiliary_weights(dual, request.base)
    seed = options.seed if request.seeds is None else request.seeds
    own, other = (ImageNoise(seed, request.indices, shape, model.device, stream) for stream in (0, 1))
    contexts = BranchContexts.of(model, concept, prompts, request.negative, options.image_size().row())
    masks = TokenMasks.of(prompts, model.device, model.text_encoder.max_length - 1 if model.static_shapes else 0)
    latents = sample_latents(model, contexts, masks, dual, options, (own, other), seen.callback, init, base, seen.maps)
    pixels = decode(model, latents, options.vae_tile, options.vae_batch)
    return init.finish(pixels) if init else pixels


def _auxiliary_weights(dual: DualBranch, base: Weights | None) -> Weights | None:
    """Return the keys and values of the auxiliary branch, None for the model's own."""
    if dual.auxiliary_weights != BASE:
        return None
    if base is None:
        raise UserError("auxiliary_weights=base needs the base model's weights: give them as base=")
    return base
