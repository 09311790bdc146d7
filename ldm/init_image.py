"""Starting from an image: img2img (Meng et al. 2022, SDEdit), and inpainting by latent replacement.

The image's latent is noised to where the solver starts. With a mask, what is to be kept is put
back after every step, noised to that step's level (Lugmayr et al. 2022, Eq. 8, without resampling).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.buckets import nearest_bucket
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.images import flatten, to_tensor
from ldm.masks import as_mask, check_size
from ldm.sampling_loop import After
from ldm.solvers import Solver


@dataclass(frozen=True)
class InitImage:
    """An image that sampling starts from, and the part of it that stays."""

    latents: Tensor  # scaled latent of the image (1, c, h, w)
    pixels: Tensor  # the image (1, 3, H, W) in [-1, 1]
    mask: Tensor | None  # 1 where to paint anew, 0 where to keep (1, 1, H, W); None paints everywhere
    strength: float  # share of the steps to take, 0 (the image itself) to 1 (from noise alone, nearly)

    @staticmethod
    @torch.inference_mode()
    def of(
        model: LatentDiffusion,
        image: Image.Image,
        height: int,
        width: int,
        strength: float,
        mask: Image.Image | None = None,
    ) -> "InitImage":
        """Fit an image, and a mask that is white where to paint anew, to height x width pixels and encode it.

        Args:
            mask: of any form that `ldm.masks.as_mask` takes.

        Raises:
            UserError: the strength is out of range, or the mask is none or has another size than the image.
        """
        if not 0 <= strength <= 1:
            raise UserError(f"strength {strength}: expected 0 (the image itself) to 1 (all steps)")
        if mask is not None:
            check_size(mask, image)
            mask = as_mask(mask)
        size = (width, height)
        pixels = to_tensor(flatten(image).resize(size, Image.Resampling.LANCZOS))[None].to(model.device)
        latents = model.config.latent_scale * model.posterior(pixels.to(model.vae_dtype)).mean.float()
        region = None
        if mask is not None:
            paint = to_tensor(mask.convert("RGB").resize(size, Image.Resampling.BILINEAR))[None, :1]
            region = (paint > 0).float().to(model.device)
        return InitImage(latents, pixels, region, strength)

    def skip(self, steps: int) -> int:
        """How many of a solver's first steps are left out."""
        return steps - min(int(steps * self.strength), steps)

    def start(self, solver: Solver, noise: Tensor) -> Tensor:
        """Return the first state, the noised latent of the image, in the shape of noise (..., b, c, h, w)."""
        return self._noised(solver.alphas[0], noise) if solver.timesteps else self.latents.expand_as(noise)

    def keep(self, solver: Solver, noise: Tensor) -> After | None:
        """Return the function that restores the kept part after each step, None without a mask; noise (..., b, c, h, w)."""
        if self.mask is None:
            return None
        # A latent cell that touches what is to be painted is painted.
        paint = F.adaptive_max_pool2d(self.mask, self.latents.shape[-2:])
        return lambda x, i: paint * x + (1 - paint) * self._noised(solver.alphas[i + 1], noise)

    def finish(self, pixels: Tensor) -> Tensor:
        """Put the kept pixels, which the autoencoder cannot reproduce exactly, over the generated ones (b, 3, H, W)."""
        return pixels if self.mask is None else self.mask * pixels + (1 - self.mask) * self.pixels

    def _noised(self, alpha: float, noise: Tensor) -> Tensor:
        return alpha**0.5 * self.latents + (1 - alpha) ** 0.5 * noise


def begin(init: InitImage | None, solver: Solver, noise: Tensor) -> tuple[Tensor, After | None]:
    """Return the first state, from an initial image or from noise, and the function that restores the kept part.

    Args:
        noise: N(0, 1) in the state's shape (..., b, c, h, w).
    """
    if init is None:
        return solver.initial_scale * noise, None
    return init.start(solver, noise), init.keep(solver, noise)


def fitting_size(model: LatentDiffusion, image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of an image's shape, its shorter side about what the model was trained at.

    A model that was trained at several shapes (SDXL) gets the nearest of those.
    """
    if model.config.unet.adm_in_channels:
        return nearest_bucket(image.height, image.width, model.config.image_size, model.config.size_multiple)
    multiple = model.config.size_multiple
    scale = model.config.image_size / min(image.size)
    width, height = (max(round(scale * side / multiple), 1) * multiple for side in image.size)
    return height, width
