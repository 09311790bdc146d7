"""What the tests give to pipelines: a prompt, seeds, pictures and ControlNets; and a short call for latents."""

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers_world import GAIN
from PIL import Image
from tiny_models import relative_error

PROMPT = "a V* dog on the beach"
FEW = {"num_inference_steps": 4, "gain": GAIN, "agg_time": 0.6}


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def half_mask():
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    return Image.fromarray(mask)


INTO = {"image": picture(), "mask_image": half_mask(), "height": 32, "width": 32}


def latents(pipe, prompt=PROMPT, **options):
    """What a few steps make, with seed 1 unless a generator is given."""
    # The first releases with ControlNet-Union write into the list of images that they are given.
    options = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
    return pipe(prompt, **{**FEW, "output_type": "latent", "generator": seeded(), **options}).images


def with_and_without(draw, pipe, options):
    """Draw two images with DCI and without; with a weight of one for the concept branch, DCI is the pipeline by itself.

    Args:
        draw: such as `latents`.

    Returns:
        (with DCI, without it, the options of both)
    """
    options = {**options, "num_images_per_prompt": 2, "negative_prompt": "a cat"}
    found, plain = draw(pipe, **options), draw(pipe, dci=False, **options)
    assert plain.shape == (2, 4, 16, 16)
    assert relative_error(draw(pipe, agg_lambda=-1e6, **options), plain) < 5e-5  # rounding; by processor up to 1e-5
    return found, plain, options


def controlnet(unet, kind=ControlNetModel, **more):
    """A ControlNet of a UNet that has an effect, as a new one has not.

    Args:
        more: options of its configuration, where its kind is not the usual one.
    """
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    if kind is not ControlNetModel:
        control = kind.from_config({**control.config, **more})
    for parameter in control.eval().parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return control
