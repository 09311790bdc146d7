"""Recognise what a file of weights holds by the names and shapes of its tensors."""

import warnings
from pathlib import Path

from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.formats import presets

_XL = "conditioner.embedders.1.model."
_XL_CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_EPS_STEPS = 110000  # training steps of the published 2.1-base, by which diffusers recognises it as well
_HINT = "give its YAML file as model= and the weights as checkpoint="

_FOREIGN = (
    (("conditioner.embedders.0.model.",), "the SDXL refiner, which refines images of the base model"),
    (("model.diffusion_model.joint_blocks.",), "Stable Diffusion 3"),
    (("model.diffusion_model.double_blocks.", "double_blocks."), "Flux"),
    (("control_model.",), "a ControlNet"),
    (
        ("down_blocks.", "unet.down_blocks.", "encoder.down_blocks.", "text_model.encoder."),
        "one part of a diffusers folder (give the whole folder)",
    ),
)
_EXPECTED = "Stable Diffusion 1.x, 2.x or XL model"
_LORA = ("lora_", ".lora_", ".lora.", "lora_A", "lora_B", "hada_w1", "lokr_w")


def refuse_foreign(state: dict[str, Tensor], source: str | Path) -> None:
    """Raise UserError for weights that are known to be something other than a Stable Diffusion 1.x, 2.x or XL model."""
    if not state:
        raise UserError(f"{source} holds no tensors: expected the weights of a Stable Diffusion model")
    if any(mark in name for name in state for mark in _LORA):
        raise UserError(f"{source} is a LoRA, a change to a model: expected a whole {_EXPECTED}")
    for prefixes, name in _FOREIGN:
        if any(key.startswith(prefixes) for key in state):
            raise UserError(f"{source} holds {name}: expected a {_EXPECTED}")
    channels = state[_FIRST].shape[1] if _FIRST in state and state[_FIRST].ndim == 4 else 4
    if channels != 4:
        raise UserError(f"{source} is a model with {channels} input channels (inpainting or depth): expected 4")


def recognise(state: dict[str, Tensor], source: str | Path, global_step: int | None) -> ModelConfig:
    """Return the configuration of a single file's model.

    What a 2.x model predicts is not in its tensors: with the published 2.1-base's step count it is the
    noise, otherwise v is taken for granted, with a warning.

    Args:
        global_step: training steps that the file speaks of; None: it does not.

    Raises:
        UserError: the model is of no known family.
    """
    refuse_foreign(state, source)
    if any(name.startswith(_XL) for name in state) and _width(state, _XL_CONTEXT) == 2048:
        return presets.sdxl()
    averaged = "model_ema." + _CONTEXT.removeprefix("model.").replace(".", "")  # where a file holds nothing else
    width = _width(state, _CONTEXT if _CONTEXT in state else averaged)
    if width == 768:
        return presets.sd_v1()
    if width == 1024:
        if global_step == _EPS_STEPS:
            return presets.sd_v2("eps")
        warnings.warn(
            f"{source} does not say what its UNet predicts; taken to be v (2.x at 768 px): for a 512 px base model give "
            "configs/model/sd-v2.yaml as model= and the file as checkpoint=",
            stacklevel=2,
        )
        return presets.sd_v2("v")
    what = f"a model with a text context {width} wide" if width else "no model under Stable Diffusion's names"
    raise UserError(
        f"{source} holds {what}, expected 768 (SD 1.x) or 1024 (SD 2.x), or SDXL's 2048 with both text encoders: {_HINT}"
    )


def _width(state: dict[str, Tensor], name: str) -> int | None:
    return state[name].shape[1] if name in state and state[name].ndim == 2 else None
