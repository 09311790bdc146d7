"""Text to picture with the model as it is: classifier-free guidance and a solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.randomness import PictureNoise
from ldm.schedule import leading_timesteps
from ldm.solvers import DDIM, Callback, Denoise, guide, run, timestep_rows


@dataclass(frozen=True)
class SamplingOptions:
    """What a picture depends on besides model and prompt."""

    steps: int = 50
    scale: float = 6.0  # classifier-free guidance; 1 is none
    eta: float = 0.0  # DDIM's stochasticity, 0 to 1
    seed: int = 0
    height: int = 512  # pixels
    width: int = 512


def check_options(model: LatentDiffusion, options: SamplingOptions) -> None:
    """Raise UserError for options that the model cannot be sampled with."""
    # Every level of the UNet must divide the latent.
    multiple = model.config.autoencoder.downsampling * 2 ** (len(model.config.unet.channel_mult) - 1)
    for name, side in (("height", options.height), ("width", options.width)):
        if side < multiple or side % multiple:
            raise UserError(f"{name} {side}: expected a multiple of {multiple} pixels for the model '{model.config.name}'")
    if not 0 <= options.eta <= 1:
        raise UserError(f"eta {options.eta}: expected 0 (deterministic) to 1 (ancestral)")
    if options.seed < 0:
        raise UserError(f"seed {options.seed}: expected a whole number from 0 on")
    leading_timesteps(options.steps, len(model.alphas_cumprod))


def make_solver(model: LatentDiffusion, options: SamplingOptions) -> DDIM:
    """Return the solver that the options name, on the model's schedule."""
    return DDIM(model.alphas_cumprod.cpu(), options.steps, options.eta, model.config.schedule.parameterization)


def guided(model: LatentDiffusion, unconditional: Tensor, conditional: Tensor, scale: float) -> Denoise:
    """Return denoise(x, t) with classifier-free guidance, one UNet call per step.

    Args:
        unconditional, conditional: contexts (b, 77, d).
    """
    if scale == 1:
        return lambda x, t: model.predict(x, timestep_rows(t, x), conditional)
    context = torch.cat([unconditional, conditional])

    def denoise(x: Tensor, t: int) -> Tensor:
        rows = torch.cat([x, x])
        return guide(*model.predict(rows, timestep_rows(t, rows), context).chunk(2), scale)

    return denoise


@torch.inference_mode()
def text_to_image(
    model: LatentDiffusion,
    prompt: str,
    indices: list[int],
    options: SamplingOptions,
    callback: Callback | None = None,
) -> Tensor:
    """Draw the pictures numbered `indices` of a prompt: (b, 3, height, width) in [-1, 1]."""
    check_options(model, options)
    noise = PictureNoise(options.seed, indices, model.latent_shape(options.height, options.width), model.device)
    unconditional, conditional = model.text_encoder(["", prompt]).repeat_interleave(len(indices), 0).chunk(2)
    solver = make_solver(model, options)
    denoise = guided(model, unconditional, conditional, options.scale)
    latents, _ = run(solver, denoise, noise(), range(options.steps), noise=noise, callback=callback)
    return model.decode(latents)
