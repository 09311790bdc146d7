"""A pipeline's networks as our model: the same tensors under Stable Diffusion's names."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint import fingerprint_of, is_fingerprinted
from ldm.config import ModelConfig, TextEncoderConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats import diffusers_folder
from ldm.formats.diffusers_names import text_names, unet_names, vae_names
from ldm.formats.weights import open_weights
from ldm.tokenizer import VOCAB_SIZE

# In place of what is not an AutoencoderKL, such as a tiny autoencoder: no concept depends on it.
_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class TextPart(NamedTuple):
    """One of a model's text encoders."""

    component: str  # of the pipeline
    place: str  # what its tensors' names begin with in Stable Diffusion
    config: TextEncoderConfig


def text_parts(config: ModelConfig) -> list[TextPart]:
    """A model's text encoders: two in SDXL, else one."""
    if config.text_encoder_2 is None:
        return [TextPart("text_encoder", "cond_stage_model.", config.text_encoder)]
    return [
        TextPart("text_encoder", "conditioner.embedders.0.", config.text_encoder),
        TextPart("text_encoder_2", "conditioner.embedders.1.", config.text_encoder_2),
    ]


def encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """Return a pipeline's tokenizers, each with its text encoder.

    Raises:
        UserError: one of them is missing, as SDXL's refiner lacks the first.
    """
    suffixes = ["", "_2"] if "text_encoder_2" in pipe.components else [""]
    names = [name + suffix for suffix in suffixes for name in ("tokenizer", "text_encoder")]
    lacking = [name for name in names if getattr(pipe, name) is None]
    if lacking:
        raise UserError(
            f"the pipeline has no {', '.join(lacking)}, where a concept's tokens go: load it with all of its text encoders; "
            "SDXL's refiner has one alone: give the base model"
        )
    return [(getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")) for suffix in suffixes]


def networks(pipe: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters that a concept may change, by component and name."""
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in pipe.components]
    encoders(pipe)
    return {name: plain_parameters(getattr(pipe, name)) for name in ("unet", "vae", *texts)}


def original(network: nn.Module) -> nn.Module:
    """Return the network itself, compiled or not."""
    return getattr(network, "_orig_mod", network)


def is_compiled(network: nn.Module) -> bool:
    """Whether torch.compile was used on a network or on parts of it, in place or around it."""
    return network is not original(network) or any(m._compiled_call_impl is not None for m in network.modules())


def plain_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """A network's parameters by the names that they have without LoRAs, whose own are left out."""
    named = original(network).named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}


def as_model(pipe: Any) -> LatentDiffusion:
    """Return our model with the tensors of a pipeline's networks; a VAE that is no AutoencoderKL is left without any.

    Raises:
        UserError: networks of another kind, or quantised, or whose weights are not in memory.
    """
    parts = networks(pipe)
    config = _config(pipe)
    with torch.device("meta"):
        model = LatentDiffusion(config)
    _check_in_memory({f"{part}.{name}": p for part, named in parts.items() if part != "vae" for name, p in named.items()})
    state = unet_names(parts["unet"], config.unet) | vae_names(parts["vae"], config.autoencoder)
    for text in text_parts(config):
        state |= text_names(parts[text.component], text.config, text.place)
    # The token table may have got further rows, and the UNet of an inpainting model reads further channels.
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = {n: t[: shapes[n][0]] if n.endswith("token_embedding.weight") else t for n, t in state.items() if n in shapes}
    fitting = {name: tensor for name, tensor in state.items() if tensor.shape == shapes[name]}
    model.load_state_dict(fitting, strict=False, assign=True)
    model.loaded_fingerprint = _fingerprint_of_files(pipe, model)
    return model


def _check_in_memory(parameters: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise UserError(
                "the pipeline is offloaded module by module: load or unload concepts before enable_sequential_cpu_offload()"
            )
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise UserError(f"the weight {name} is quantised: load the concept into the pipeline first, and quantise then")


def _config(pipe: Any) -> ModelConfig:
    """Read the networks' configurations as diffusers saves them, but for what the weights of a concept do not depend on."""
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    contents = {
        "unet": json.loads(original(pipe.unet).to_json_string()) | {"in_channels": 4, "out_channels": 4},
        "vae": json.loads(pipe.vae.to_json_string()) if _is_usual(pipe.vae) else _VAE,
        **{
            part: getattr(pipe, part).config.to_dict() | {"vocab_size": VOCAB_SIZE}
            for part in ("text_encoder", "text_encoder_2")
            if part in pipe.components
        },
        "scheduler": _SCHEDULER | {"prediction_type": "v_prediction" if prediction == "v_prediction" else "epsilon"},
    }
    files = {"scheduler": "scheduler_config.json"}
    with tempfile.TemporaryDirectory() as folder:
        for part, content in contents.items():
            (Path(folder) / part).mkdir()
            file = Path(folder) / part / files.get(part, "config.json")
            file.write_text(json.dumps(content, default=str), encoding="utf-8")
        return diffusers_folder.read_config(Path(folder))


def _is_usual(vae: Any) -> bool:
    return type(original(vae)).__name__ == "AutoencoderKL"


def _fingerprint_of_files(pipe: Any, model: LatentDiffusion) -> str | None:
    """Return the fingerprint of the files that bf16 weights were rounded from; None where the weights have it themselves."""
    own = {name: tensor for name, tensor in model.state_dict().items() if is_fingerprinted(name)}
    if all(tensor.dtype != torch.bfloat16 for tensor in own.values()):
        return None
    source = pipe.config.get("_name_or_path")
    for half in (False, True):
        try:
            state = open_weights(source, half).state if source else {}
        except UserError:
            state = {}
        found = {name: state[name] for name in own if name in state}
        if len(found) == len(own) and all(_rounded_to(found[name], tensor) for name, tensor in own.items()):
            return fingerprint_of(found)
    return None


def _rounded_to(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and torch.equal(tensor.to(own.dtype), own.cpu())
