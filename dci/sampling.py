"""DCI sampling (Sec. 3.3): an early phase with two branches, then the concept branch alone.

Both phases are the same solver. In the early one its state is the two branches' latents, stacked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dci.concept import Concept
from dci.integration import BASE, DualBranch, TokenMasks, integrating_attend
from dci.layers import check_layers, integrated_layers
from dci.maps import MapsCallback, observer
from dci.prompts import BranchPrompts
from ldm.attention import Attend, attend, stacked
from ldm.canvas import Canvas, begin
from ldm.decoding import decode
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.loop import Callback, Denoise, Noise, guide, run, timestep_rows
from ldm.randomness import PictureNoise
from ldm.sampling import SamplingOptions, check_options, guided, make_solver, per_picture

Weights = dict[str, Tensor]
"""Matrices by their names in a Stable Diffusion checkpoint."""


@dataclass(frozen=True)
class BranchContexts:
    """Text contexts of a batch, each (b, 77, d)."""

    unconditional: Tensor
    concept: Tensor
    auxiliary: Tensor

    @staticmethod
    def of(model: LatentDiffusion, concept: Concept, prompts: list[BranchPrompts], negative: str = "") -> "BranchContexts":
        """Encode a batch's prompts, the modifier tokens with the concept's embeddings."""
        text = model.text_encoder
        unconditional = text.tokenize([negative]).tolist() * len(prompts)
        rows = [*unconditional, *(p.concept_ids for p in prompts), *(p.auxiliary_ids for p in prompts)]
        context = text.contexts(rows, concept.modifiers)
        return BranchContexts(*context.chunk(3))


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
    rows = [(0, contexts.unconditional), (0, contexts.concept), (1, contexts.unconditional), (1, contexts.auxiliary)]
    if scale == 1:
        rows = [rows[1], rows[3]]
    elif dual.shared_guidance:
        rows = [rows[0], rows[1], rows[3]]
    branch_of_row = [branch for branch, _ in rows]
    text = stacked([model.keys_values(context, base if branch else None) for branch, context in rows])
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
    canvas: Canvas | None = None,
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
    solver = make_solver(model, options, canvas)
    dual_steps = sum(dual.is_dual(t, len(solver.alphas_cumprod)) for t in solver.timesteps) if dual else 0

    # The concept branch's first noise is drawn once, so that both phases keep the same parts of a canvas.
    first, history = noises[0](), None
    x, after = begin(canvas, solver, first)

    # Divide and conquer: both branches.
    if dual_steps:
        denoise = dual_guided(model, contexts, masks, dual, options.scale, first.shape[-2:], base, maps)
        state, after_both = begin(canvas, solver, torch.stack([first, first if dual.shared_noise else noises[1]()]))
        state, history = run(
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
    denoise = guided(model, contexts.unconditional, contexts.concept, options.scale)
    rest = range(dual_steps, len(solver.timesteps))
    return run(solver, denoise, x, rest, history, noise=noises[0], after=after, callback=callback)[0]


@torch.inference_mode()
def sample(
    model: LatentDiffusion,
    concept: Concept,
    prompt: BranchPrompts | list[BranchPrompts],
    indices: list[int],
    options: SamplingOptions,
    dual: DualBranch | None,
    callback: Callback | None = None,
    negative: str = "",
    canvas: Canvas | None = None,
    base: Weights | None = None,
    maps: MapsCallback | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Draw the pictures numbered `indices` with a concept.

    Args:
        model: the base model with the concept applied (`Concept.apply`).
        prompt: one for all pictures, or one for each.
        indices: a picture depends on its prompt, its seed and its index, not on the batch it is made in.
        dual: DCI's settings; None is plain sampling of the fine-tuned model.
        negative: what guidance leads away from, in both branches.
        canvas: the picture that both branches start from; None starts from noise alone.
        base: the weights that the concept replaced (`Concept.replaced`), where `dual.auxiliary_weights` is base.
        maps: shown the branch weights and attention maps while both branches run, see `dci.maps`.
        seeds: each picture's seed; None: the options' for all.

    Returns:
        (b, 3, height, width) in [-1, 1].

    Raises:
        UserError: options that the model cannot be sampled with, layers that it does not have, or
            the base model's weights are asked for and not given.
    """
    check_options(model, options)
    prompts, shape = per_picture(prompt, indices), model.latent_shape(options.height, options.width)
    if dual is not None:
        check_layers(model, options, dual.layers)
        base = _auxiliary_weights(dual, base)
    seed = options.seed if seeds is None else seeds
    noises = tuple(PictureNoise(seed, indices, shape, model.device, stream) for stream in (0, 1))
    contexts = BranchContexts.of(model, concept, prompts, negative)
    masks = TokenMasks.of(prompts, model.device, model.text_encoder.max_length - 1 if model.static_shapes else 0)
    latents = sample_latents(model, contexts, masks, dual, options, noises, callback, canvas, base, maps)
    pixels = decode(model, latents, options.vae_tile, options.vae_batch)
    return canvas.finish(pixels) if canvas else pixels


def _auxiliary_weights(dual: DualBranch, base: Weights | None) -> Weights | None:
    """Return the keys and values of the auxiliary branch, None for the model's own."""
    if dual.auxiliary_weights != BASE:
        return None
    if base is None:
        raise UserError("auxiliary_weights=base needs the base model's weights: hand them to sample as base=")
    return base
