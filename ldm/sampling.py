"""Text to picture with the model as it is: classifier-free guidance and a solver."""

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import schedule
from ldm.canvas import Canvas, begin
from ldm.decoding import SMALLEST, decode
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.loop import Callback, Denoise, guide, run, timestep_rows
from ldm.randomness import PictureNoise
from ldm.solvers import SOLVERS, Solver


@dataclass(frozen=True)
class SamplingOptions:
    """What a picture depends on besides model and prompt."""

    steps: int = 50
    scale: float = 6.0  # classifier-free guidance; 1 is none
    eta: float = 0.0  # DDIM's stochasticity, 0 to 1
    seed: int = 0
    height: int = 512  # pixels
    width: int = 512
    solver: str = "ddim"  # a name in ldm.solvers.SOLVERS
    spacing: str = "leading"  # of the timesteps: leading or trailing
    zero_terminal_snr: bool = False  # rescale the schedule to end in pure noise; for v-prediction models
    vae_tile: int | None = None  # pixels of a tile's side in decoding; None: whole pictures, if memory allows
    vae_batch: int | None = None  # pictures decoded at a time; None: as many as memory allows


def solver_name(name: str) -> str:
    """Return the solver's name in SOLVERS; underscores, "pp" for "++" and some other usual names will do.

    Raises:
        UserError: no such solver; the known ones are named.
    """
    plain = name.lower().replace("_", "-").replace("pp", "++").replace("-2m", "2m").replace("-ancestral", "-a")
    plain = _OTHER_NAMES.get(plain, plain)
    if plain not in SOLVERS:
        near = difflib.get_close_matches(plain, SOLVERS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown solver '{name}': expected one of {', '.join(SOLVERS)}; did you mean '{near}'?")
    return plain


_OTHER_NAMES = {"dpm++": "dpm++2m", "dpm++-karras": "dpm++2m-karras", "dpm-solver++": "dpm++2m", "pndm": "plms"}


def check_options(model: LatentDiffusion, options: SamplingOptions) -> None:
    """Raise UserError for options that the model cannot be sampled with."""
    multiple = model.config.size_multiple
    for name, side in (("height", options.height), ("width", options.width)):
        if side < multiple or side % multiple:
            raise UserError(f"{name} {side}: expected a multiple of {multiple} pixels for the model '{model.config.name}'")
    if not 0 <= options.eta <= 1:
        raise UserError(f"eta {options.eta}: expected 0 (deterministic) to 1 (ancestral)")
    if options.eta and solver_name(options.solver) != "ddim":
        raise UserError(f"eta {options.eta}: only the solver ddim has it, not {options.solver}: leave it out")
    if options.seed < 0:
        raise UserError(f"seed {options.seed}: expected a whole number from 0 on")
    if options.spacing not in ("leading", "trailing"):
        raise UserError(f"spacing '{options.spacing}': expected leading or trailing")
    smallest = SMALLEST * model.config.autoencoder.downsampling
    if options.vae_tile is not None and options.vae_tile < smallest:
        raise UserError(f"vae_tile {options.vae_tile}: expected {smallest} pixels or more")
    make_solver(model, options)


def make_solver(model: LatentDiffusion, options: SamplingOptions, canvas: Canvas | None = None) -> Solver:
    """Return the solver that the options name, on the model's schedule.

    Args:
        canvas: what sampling starts from; the steps before it are left out.
    """
    skip = canvas.skip(options.steps) if canvas else 0
    alphas = model.alphas_cumprod.cpu()
    if options.zero_terminal_snr and not model.config.schedule.zero_terminal_snr:
        alphas = schedule.zero_terminal_snr(alphas)
    solver = SOLVERS[solver_name(options.solver)]
    parameterization = model.config.schedule.parameterization
    return solver(alphas, options.steps, options.eta, parameterization, options.spacing, skip)


def guided(model: LatentDiffusion, unconditional: Tensor, conditional: Tensor, scale: float) -> Denoise:
    """Return denoise(x, t) with classifier-free guidance, one UNet call per step.

    Args:
        unconditional, conditional: contexts (b, 77, d).
    """
    if scale == 1:
        text = model.keys_values(conditional)
        return lambda x, t: model.predict(x, timestep_rows(t, x), text)
    text = model.keys_values(torch.cat([unconditional, conditional]))

    def denoise(x: Tensor, t: int) -> Tensor:
        rows = torch.cat([x, x])
        return guide(*model.predict(rows, timestep_rows(t, rows), text).chunk(2), scale)

    return denoise


def per_picture(prompt: Any, indices: list[int]) -> list:
    """Return the prompt of each picture, from one for all or a list of them.

    Raises:
        UserError: not as many prompts as pictures.
    """
    prompts = list(prompt) if isinstance(prompt, list) else [prompt] * len(indices)
    if len(prompts) != len(indices):
        raise UserError(f"{len(prompts)} prompts for {len(indices)} pictures: expected one prompt, or one for each picture")
    return prompts


@torch.inference_mode()
def text_to_image(
    model: LatentDiffusion,
    prompt: str | list[str],
    indices: list[int],
    options: SamplingOptions,
    callback: Callback | None = None,
    negative: str = "",
    canvas: Canvas | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Draw the pictures numbered `indices` of a prompt: (b, 3, height, width) in [-1, 1].

    Args:
        prompt: one for all pictures, or one for each.
        negative: what guidance leads away from.
        canvas: the picture to start from; None starts from noise alone.
        seeds: each picture's seed; None: the options' for all.
    """
    check_options(model, options)
    prompts, shape = per_picture(prompt, indices), model.latent_shape(options.height, options.width)
    noise = PictureNoise(options.seed if seeds is None else seeds, indices, shape, model.device)
    text = model.text_encoder
    unconditional, conditional = text.contexts(text.tokenize([negative] * len(prompts) + prompts).tolist()).chunk(2)
    solver = make_solver(model, options, canvas)
    denoise = guided(model, unconditional, conditional, options.scale)
    x, after = begin(canvas, solver, noise())
    latents, _ = run(solver, denoise, x, range(len(solver.timesteps)), noise=noise, after=after, callback=callback)
    pixels = decode(model, latents, options.vae_tile, options.vae_batch)
    return canvas.finish(pixels) if canvas else pixels
