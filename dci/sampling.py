"""DCI sampling (Sec. 3.3): an early phase with two branches, then the concept branch alone.

Both phases are the same solver. In the early one its state is the two branches' latents, stacked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dci.concept import Concept
from dci.integration import DualBranch, TokenMasks, integrating_attend
from dci.prompts import BranchPrompts
from ldm.canvas import Canvas, begin
from ldm.decoding import decode
from ldm.diffusion import LatentDiffusion
from ldm.loop import Callback, Denoise, Noise, guide, run, timestep_rows
from ldm.randomness import PictureNoise
from ldm.sampling import SamplingOptions, check_options, guided, make_solver, per_picture


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
        unconditional = text.tokenize([negative] * len(prompts))
        rows = [prompt.concept_ids for prompt in prompts] + [prompt.auxiliary_ids for prompt in prompts]
        ids = torch.cat([unconditional, torch.tensor(rows, device=model.device)])
        context = text.encode(text.embed(ids, concept.modifiers.to(model.device)))
        return BranchContexts(*context.chunk(3))


def dual_guided(
    model: LatentDiffusion, contexts: BranchContexts, masks: TokenMasks, dual: DualBranch, scale: float
) -> Denoise:
    """Return denoise(state, t) for both branches, in one UNet call per step.

    The state is (2, b, c, h, w): concept branch, auxiliary branch. With shared guidance the rows
    are [unconditional, concept, auxiliary]; else [unconditional, concept, unconditional, auxiliary].
    """
    b = len(contexts.concept)
    if dual.shared_guidance:
        branch_of_row, context = [0, 0, 1], [contexts.unconditional, contexts.concept, contexts.auxiliary]
    else:
        branch_of_row = [0, 0, 1, 1]
        context = [contexts.unconditional, contexts.concept, contexts.unconditional, contexts.auxiliary]
    context = torch.cat(context)
    auxiliary = slice(len(context) - b, len(context))
    attend = integrating_attend(masks, dual, slice(b, 2 * b), auxiliary)

    def denoise(state: Tensor, t: int) -> Tensor:
        rows = state[branch_of_row].flatten(0, 1)
        output = model.predict(rows, timestep_rows(t, rows), context, attend).chunk(len(branch_of_row))
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
) -> Tensor:
    """Denoise a batch from its first noise to its latents (b, c, h, w).

    Args:
        dual: None samples the concept's prompt plainly.
        noises: of the concept branch and of the auxiliary branch, which never share numbers, so that
            the concept branch sees the same noise with DCI and without.
        callback: called after each step; in the early phase its tensors hold both branches, stacked.
    """
    solver = make_solver(model, options, canvas)
    dual_steps = sum(dual.is_dual(t, len(solver.alphas_cumprod)) for t in solver.timesteps) if dual else 0

    # The concept branch's first noise is drawn once, so that both phases keep the same parts of a canvas.
    first, history = noises[0](), None
    x, after = begin(canvas, solver, first)

    # Divide and conquer: both branches.
    if dual_steps:
        denoise = dual_guided(model, contexts, masks, dual, options.scale)
        state, after_both = begin(canvas, solver, torch.stack([first, noises[1]()]))
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
    seeds: list[int] | None = None,
) -> Tensor:
    """Draw the pictures numbered `indices` of a prompt with a concept.

    Args:
        model: the base model with the concept applied (`Concept.apply`).
        prompt: one for all pictures, or one for each.
        indices: a picture depends on its prompt, its seed and its index, not on the batch it is made in.
        dual: DCI's settings; None is plain sampling of the fine-tuned model.
        negative: what guidance leads away from, in both branches.
        canvas: the picture that both branches start from; None starts from noise alone.
        seeds: each picture's seed; None: the options' for all.

    Returns:
        (b, 3, height, width) in [-1, 1].

    Raises:
        UserError: options that the model cannot be sampled with.
    """
    check_options(model, options)
    prompts, shape = per_picture(prompt, indices), model.latent_shape(options.height, options.width)
    seed = options.seed if seeds is None else seeds
    noises = tuple(PictureNoise(seed, indices, shape, model.device, stream) for stream in (0, 1))
    contexts = BranchContexts.of(model, concept, prompts, negative)
    masks = TokenMasks.of(prompts, model.device)
    latents = sample_latents(model, contexts, masks, dual, options, noises, callback, canvas)
    pixels = decode(model, latents, options.vae_tile, options.vae_batch)
    return canvas.finish(pixels) if canvas else pixels
