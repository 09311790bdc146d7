"""Text to image with the model as it is: classifier-free guidance and a solver."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import schedule
from ldm.conditioning import Conditioning, ImageSize, concatenated, conditioning
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.init_image import InitImage, begin
from ldm.noise import ImageNoise
from ldm.option_types import checked
from ldm.runtime.decoding import SMALLEST, decode
from ldm.sampling_loop import Callback, Denoise, guide, solve, timestep_rows
from ldm.solvers import SOLVERS, SPACINGS, Solver
from ldm.texts import nearest


@dataclass(frozen=True)
class SamplingOptions:
    """What an image depends on besides model and prompt."""

    steps: int = 50
    scale: float = 6.0  # classifier-free guidance; 1 is none
    eta: float = 0.0  # DDIM's stochasticity, 0 to 1
    seed: int = 0
    height: int = 512  # pixels
    width: int = 512
    solver: str = "ddim"  # a name in ldm.solvers.SOLVERS
    spacing: str | None = None  # of the timesteps: leading, trailing or linspace; None: the solver's usual one
    zero_terminal_snr: bool = False  # rescale the schedule to end in pure noise; for v-prediction models
    vae_tile: int | None = None  # pixels of a tile's side in decoding; None: whole images, if memory allows
    vae_batch: int | None = None  # images decoded at a time; None: as many as memory allows
    original_size: tuple[int, int] | None = None  # SDXL's condition: the original's height and width; None: the image's
    crop: tuple[int, int] | None = None  # and of the crop's top and left; None: nothing was cut off

    def metadata(self) -> dict[str, Any]:
        """The options as a record of an image has them; sizes that were not given are left out."""
        metadata = dataclasses.asdict(self)
        sizes = {name: metadata.pop(name) for name in ("original_size", "crop")}
        return metadata | {name: list(size) for name, size in sizes.items() if size is not None}

    def image_size(self) -> ImageSize:
        """The sizes that a model such as SDXL is conditioned on."""
        size = (self.height, self.width)
        return ImageSize(self.original_size or size, self.crop or (0, 0), size)


def solver_name(name: str) -> str:
    """Return the solver's name in SOLVERS; underscores, "pp" for "++" and some other usual names will do.

    Raises:
        UserError: no such solver; the known ones are named.
    """
    plain = name.lower().replace("_", "-").replace("pp", "++").replace("-2m", "2m").replace("-ancestral", "-a")
    plain = _OTHER_NAMES.get(plain, plain)
    if plain not in SOLVERS:
        near = nearest(plain, SOLVERS)
        hint = f"; did you mean '{near}'?" if near else ""
        raise UserError(f"solver '{name}': expected one of {', '.join(SOLVERS)}{hint}")
    return plain


_OTHER_NAMES = {"dpm++": "dpm++2m", "dpm++-karras": "dpm++2m-karras", "dpm-solver++": "dpm++2m", "pndm": "plms"}


def check_options(model: LatentDiffusion, options: SamplingOptions) -> None:
    """Raise UserError for options that the model cannot be sampled with."""
    checked(SamplingOptions, vars(options))
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
    if options.spacing not in (None, *SPACINGS):
        raise UserError(f"spacing '{options.spacing}': expected {', '.join(SPACINGS)}")
    schedule_config = model.config.schedule
    if schedule_config.parameterization == "eps" and (options.zero_terminal_snr or schedule_config.zero_terminal_snr):
        raise UserError(
            f"zero_terminal_snr: the model '{model.config.name}' predicts noise, and pure noise holds nothing of the image: "
            "leave it out, or take a v-prediction model"
        )
    smallest = SMALLEST * model.config.autoencoder.downsampling
    if options.vae_tile is not None and options.vae_tile < smallest:
        raise UserError(f"vae_tile {options.vae_tile}: expected {smallest} pixels or more")
    _check_sizes(model, options)
    make_solver(model, options)


def _check_sizes(model: LatentDiffusion, options: SamplingOptions) -> None:
    for name, value, least in (("original_size", options.original_size, 1), ("crop", options.crop, 0)):
        if value is None:
            continue
        whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int for side in value)
        if not whole or min(value) < least:
            raise UserError(f"{name} {value}: expected two whole numbers from {least} on, such as (1024, 768)")
        if not model.config.unet.adm_in_channels:
            raise UserError(
                f"{name} {value}: the model '{model.config.name}' has no condition on an image's size, "
                "only SDXL has: leave it out"
            )


def make_solver(model: LatentDiffusion, options: SamplingOptions, init: InitImage | None = None) -> Solver:
    """Return the solver that the options name, on the model's schedule.

    Args:
        init: what sampling starts from; the steps before it are left out.
    """
    skip = init.skip(options.steps) if init else 0
    alphas = model.alphas_cumprod.cpu()
    if options.zero_terminal_snr and not model.config.schedule.zero_terminal_snr:
        alphas = schedule.zero_terminal_snr(alphas)
    solver = SOLVERS[solver_name(options.solver)]
    parameterization = model.config.schedule.parameterization
    return solver(alphas, options.steps, options.eta, parameterization, options.spacing, skip)


def guided(
    model: LatentDiffusion, unconditional: Tensor | Conditioning, conditional: Tensor | Conditioning, scale: float
) -> Denoise:
    """Return denoise(x, t) with classifier-free guidance, one UNet call per step.

    Args:
        unconditional, conditional: what the text encoder made of the prompts, or contexts (b, 77, d) by themselves.
    """
    if scale == 1:
        text = model.read(conditional)
        return lambda x, t: model.predict(x, timestep_rows(t, x), text)
    text = model.read(concatenated([conditioning(unconditional), conditioning(conditional)]))

    def denoise(x: Tensor, t: int) -> Tensor:
        rows = torch.cat([x, x])
        without, of_prompt = model.predict(rows, timestep_rows(t, rows), text).chunk(2)
        return guide(without, of_prompt, scale)

    return denoise


def per_image(prompt: Any, indices: list[int]) -> list:
    """Return the prompt of each image, from one for all or a list of them.

    Raises:
        UserError: not as many prompts as images.
    """
    prompts = list(prompt) if isinstance(prompt, list) else [prompt] * len(indices)
    if len(prompts) != len(indices):
        raise UserError(f"{len(prompts)} prompts for {len(indices)} images: expected one prompt, or one for each image")
    return prompts


@torch.inference_mode()
def text_to_image(
    model: LatentDiffusion,
    prompt: str | list[str],
    indices: list[int],
    options: SamplingOptions,
    callback: Callback | None = None,
    negative: str = "",
    init: InitImage | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Generate the images numbered `indices` of a prompt: (b, 3, height, width) in [-1, 1].

    Args:
        prompt: one for all images, or one for each.
        negative: what guidance leads away from.
        init: the image to start from; None starts from noise alone.
        seeds: each image's seed; None: the options' for all.
    """
    check_options(model, options)
    prompts, shape = per_image(prompt, indices), model.latent_shape(options.height, options.width)
    noise = ImageNoise(options.seed if seeds is None else seeds, indices, shape, model.device)
    text, sizes = model.text_encoder, options.image_size().row()
    unconditional = text.negative(negative, len(prompts), sizes)
    conditional = text.conditions(text.tokenize(prompts).tolist(), None, sizes)
    solver = make_solver(model, options, init)
    denoise = guided(model, unconditional, conditional, options.scale)
    x, after = begin(init, solver, noise())
    latents, _ = solve(solver, denoise, x, range(len(solver.timesteps)), noise=noise, after=after, callback=callback)
    pixels = decode(model, latents, options.vae_tile, options.vae_batch)
    return init.finish(pixels) if init else pixels
