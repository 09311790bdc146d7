"""Which cross-attention layers the branches are integrated in, as users name them."""

import re

from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.text_to_image import SamplingOptions
from ldm.unet import CrossLayer, UNet

PARTS = ("input", "middle", "output")


def sides(layers: list[CrossLayer], latent: tuple[int, int]) -> list[int]:
    """Return the resolution of each layer: the shorter side of its map in pixels, for latents of (h, w) cells."""
    return [min(latent) // layer.factor for layer in layers]


def integrated_layers(unet: UNet, names: tuple[str, ...] | None, latent: tuple[int, int]) -> list[bool]:
    """Return for every cross-attention layer, in the order they run, whether one of the names means it.

    A name is a part of the UNet (input, middle, output), a resolution (the shorter side of the
    layer's map in pixels at the size that is sampled, such as 16), a layer's number (layer0, layer1,
    ...), or the beginning of its name in a Stable Diffusion checkpoint (input_blocks.1.1).

    Args:
        names: None means all layers.
        latent: height and width of the latents that are sampled, in cells.

    Raises:
        UserError: a name means no layer; those that do are listed.
    """
    layers = unet.cross_layers()
    if names is None:
        return [True] * len(layers)
    if not names:
        raise UserError(f"layers: none is named: give some of {_listed(layers, latent)}")
    chosen = [False] * len(layers)
    for name in names:
        meant = [_means(name, *entry) for entry in zip(range(len(layers)), layers, sides(layers, latent), strict=True)]
        if not any(meant):
            raise UserError(f"layers '{name}': expected some of {_listed(layers, latent)}")
        chosen = [a or b for a, b in zip(chosen, meant, strict=True)]
    return chosen


def check_layers(model: LatentDiffusion, options: SamplingOptions, names: tuple[str, ...] | None) -> None:
    """Raise UserError for names that mean no layer at the size that is sampled."""
    integrated_layers(model.unet, names, model.latent_shape(options.height, options.width)[1:])


def _means(name: str, number: int, layer: CrossLayer, side: int) -> bool:
    name = name.strip().lower().removeprefix("model.diffusion_model.")
    return name in (layer.part, str(side), f"layer{number}") or re.match(re.escape(name) + r"(\.|$)", layer.name) is not None


def _listed(layers: list[CrossLayer], latent: tuple[int, int]) -> str:
    resolutions = ", ".join(map(str, sorted(set(sides(layers, latent)), reverse=True)))
    first, last = layers[0].name, layers[-1].name
    return (
        f"{', '.join(PARTS)}; the resolutions {resolutions}; layer0 ({_short(first)}) to "
        f"layer{len(layers) - 1} ({_short(last)})"
    )


def _short(name: str) -> str:
    return name.partition(".transformer_blocks")[0]
