"""A model's layers under the names that other programs' files call them by."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ldm.config import ModelConfig, TextEncoderConfig
from ldm.diffusion import LatentDiffusion
from ldm.formats.diffusers_names import to_text, to_unet

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
KOHYA_UNET, KOHYA_TEXT = "lora_unet_", "lora_te_"
PAIR = ("conditioner.embedders.0.", "conditioner.embedders.1.")  # in place of TEXT, where there are two encoders
KOHYA_PAIR = ("lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Place:
    """Where a layer of other programs lies in ours."""

    name: str  # SD name without .weight or .bias; of a weight that holds several layers with its ending, see `weight`
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of the n equal shares of the rows

    @property
    def weight(self) -> str:
        """SD name of the weight."""
        return self.name + ("weight" if self.name.endswith("in_proj_") else ".weight")

    @property
    def bias(self) -> str:
        """SD name of the bias."""
        return self.name + ("bias" if self.name.endswith("in_proj_") else ".bias")


@dataclass(frozen=True)
class Layers:
    """All layers of a model with weights: their shapes, and diffusers' names of them."""

    config: ModelConfig
    shapes: dict[str, torch.Size]  # SD name of each parameter -> its shape
    unet: dict[str, Place]  # diffusers' name of a layer, such as down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k
    text: dict[str, Place]  # transformers' name, such as text_model.encoder.layers.0.self_attn.q_proj

    text_2: dict[str, Place] = field(default_factory=dict)  # the second text encoder's, as `text`

    @staticmethod
    def of(config: ModelConfig) -> "Layers":
        """Name the layers of a configuration's model; no weights are needed."""
        with torch.device("meta"):
            state = LatentDiffusion(config).state_dict()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        rename = to_unet(config.unet)
        owned = [
            name.removesuffix(".weight").removeprefix(UNET)
            for name in shapes
            if name.startswith(UNET) and name.endswith(".weight")
        ]
        unet = {rename(name + ".").removesuffix("."): Place(UNET + name) for name in owned}
        if config.text_encoder_2 is None:
            return Layers(config, shapes, unet, _text(state, TEXT, config.text_encoder))
        encoders = (config.text_encoder, config.text_encoder_2)
        first, second = (_text(state, place, encoder) for place, encoder in zip(PAIR, encoders, strict=True))
        return Layers(config, shapes, unet, first, second)

    @cached_property
    def kohya(self) -> dict[str, Place]:
        """kohya's names of the layers: diffusers' and, for the UNet, SD's too, their dots as underscores."""
        names = {KOHYA_UNET + _flat(place.name.removeprefix(UNET)): place for place in self.unet.values()}
        names |= {KOHYA_UNET + _flat(name): place for name, place in self.unet.items()}
        names |= {KOHYA_TEXT + _flat(name): place for name, place in self.text.items()}
        return names | {prefix + _flat(name): p for prefix, text in self._texts() for name, p in text.items()}

    def _texts(self) -> list[tuple[str, dict[str, Place]]]:
        """kohya's prefix of each text encoder, and its layers."""
        pair = zip(KOHYA_PAIR, (self.text, self.text_2), strict=True)
        return [*pair] if self.text_2 else [(KOHYA_TEXT, self.text)]

    @cached_property
    def kohya_of(self) -> dict[str, list[tuple[str, Place]]]:
        """SD name of a layer -> kohya's names of what it holds."""
        found: dict[str, list[tuple[str, Place]]] = {}
        for prefix, names in ((KOHYA_UNET, self.unet), *self._texts()):
            for name, place in names.items():
                found.setdefault(place.name, []).append((prefix + _flat(name), place))
        return found


def _text(state: dict[str, Tensor], prefix: str, config: TextEncoderConfig) -> dict[str, Place]:
    text: dict[str, Place] = {}
    for name in state:
        ours = name.removesuffix("weight").removesuffix(".")
        if name.startswith(prefix) and name.endswith("weight"):
            parts = list(to_text({name.removeprefix(prefix): state[name]}, config))
            text |= {part.removesuffix(".weight"): Place(ours, (i, len(parts))) for i, part in enumerate(parts)}
    return text


def _flat(name: str) -> str:
    return name.replace(".", "_")


def layer_of(name: str) -> str:
    """SD name of a parameter -> that of its layer, as `Place.name` has it."""
    return name.removesuffix("weight").removesuffix("bias").removesuffix(".")
