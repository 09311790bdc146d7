"""The YAML file of Stability AI's generative-models for SDXL (`network_config`, `conditioner_config`), as it is shipped.

Like `compvis_config`: a target is a name to look up, nothing is imported by it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ldm.config import ModelConfig, UNetConfig
from ldm.errors import UserError
from ldm.formats import presets
from ldm.formats.compvis_config import SGM_UNET, params_of, read_autoencoder, read_unet

_ENGINE = "sgm.models.diffusion.DiffusionEngine"
_AUTOENCODERS = ("sgm.models.autoencoder.AutoencoderKLInferenceWrapper", "sgm.models.autoencoder.AutoencoderKL")
_CONDITIONER = "sgm.modules.GeneralConditioner"
_CLIP = "sgm.modules.encoders.modules.FrozenCLIPEmbedder"
_OPENCLIP = "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2"
_SIZE = "sgm.modules.encoders.modules.ConcatTimestepEmbedderND"
_DENOISER = "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser"
_SCHEDULE = "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"
_SCALINGS = {
    "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling": "eps",
    "sgm.modules.diffusionmodules.denoiser_scaling.VScaling": "v",
}

_PARTS = ("network_config", "conditioner_config", "first_stage_config", "denoiser_config")
_IGNORED = {
    "disable_first_stage_autocast",
    "scale_factor",
    "ckpt_path",
    "sampler_config",
    "loss_fn_config",
    "input_key",
    "optimizer_config",
    "scheduler_config",
    "use_ema",
    "ema_decay_rate",
    "log_keys",
    "no_cond_log",
    "compile_model",
    "network_wrapper",
}
"""Of the engine: what is read by itself, or changes nothing in a trained model."""

_EMBEDDERS: list[tuple[str, str, dict[str, Any]]] = [
    ("txt", _CLIP, {"layer": "hidden", "layer_idx": 11}),
    ("txt", _OPENCLIP, {"arch": "ViT-bigG-14", "layer": "penultimate", "always_return_pooled": True, "legacy": False}),
    ("original_size_as_tuple", _SIZE, {"outdim": 256}),
    ("crop_coords_top_left", _SIZE, {"outdim": 256}),
    ("target_size_as_tuple", _SIZE, {"outdim": 256}),
]
"""What the base model is conditioned on, in this order."""

_FREE = {"version", "freeze", "device", "max_length"}  # of the embedders: where weights come from


def is_sgm_config(content: dict[str, Any]) -> bool:
    """Whether a YAML file's mapping is of this form."""
    model = content.get("model")
    params = model.get("params") if isinstance(model, dict) else None
    return isinstance(params, dict) and "network_config" in params


def convert(content: dict[str, Any], source: str | Path) -> ModelConfig:
    """Return the model configuration that an official YAML file describes.

    Args:
        content: the file's mapping.
        source: the file, for messages.

    Raises:
        UserError: the refiner, or something that is not known or that our networks are not built for.
    """
    content = _renamed(content)
    params = params_of(content["model"], "model", (_ENGINE,), source)
    unknown = sorted(set(params) - {*_PARTS, *_IGNORED})
    missing = [part for part in _PARTS if not isinstance(params.get(part), dict)]
    if unknown:
        raise UserError(f"{source}: unknown key 'model.params.{unknown[0]}': expected the official file's")
    if missing:
        raise UserError(f"{source} lacks model.params.{missing[0]}: expected a mapping, as in the official file")
    _check_embedders(params["conditioner_config"], source)
    unet = read_unet(params["network_config"], "model.params.network_config", SGM_UNET, source)
    autoencoder = read_autoencoder(params["first_stage_config"], _AUTOENCODERS, source)
    base = presets.sdxl()
    return dataclasses.replace(
        base,
        checkpoint=params.get("ckpt_path"),
        latent_scale=params.get("scale_factor", 1.0),
        unet=_without_unused_depths(unet),
        autoencoder=dataclasses.replace(autoencoder, force_upcast=bool(params.get("disable_first_stage_autocast", False))),
        schedule=dataclasses.replace(base.schedule, parameterization=_parameterization(params["denoiser_config"], source)),
    )


def _renamed(content: Any) -> Any:
    """Early files have `ldm.` in place of `sgm.` before the targets."""
    if isinstance(content, dict):
        return {key: _renamed(value) for key, value in content.items()} | _renamed_target(content.get("target"))
    return [_renamed(entry) for entry in content] if isinstance(content, list) else content


def _renamed_target(target: Any) -> dict[str, str]:
    old = isinstance(target, str) and target.startswith("ldm.")
    return {"target": "sgm." + target.removeprefix("ldm.")} if old else {}


def _check_embedders(section: dict[str, Any], source: str | Path) -> None:
    place = "model.params.conditioner_config"
    models = params_of(section, place, (_CONDITIONER,), source).get("emb_models")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{source} lacks {place}.params.emb_models: expected a list, as in the official file")
    if models and models[0].get("target") == _OPENCLIP:
        raise UserError(f"{source} is the SDXL refiner, which refines images of the base model: expected SDXL base")
    if len(models) != len(_EMBEDDERS):
        raise UserError(f"{source}: {len(models)} emb_models: expected {len(_EMBEDDERS)}, as in the official file")
    for number, (model, (key, target, required)) in enumerate(zip(models, _EMBEDDERS, strict=True)):
        entry = f"{place}.params.emb_models[{number}]"
        if model.get("target") != target or model.get("input_key") != key:
            raise UserError(
                f"{source}: {entry} is {model.get('target')} of {model.get('input_key')}: expected {target} of {key}"
            )
        params = model.get("params") or {}
        for name in sorted({*params, *required} - _FREE):
            if params.get(name) != required.get(name):
                raise UserError(f"{source}: {entry}.params.{name}={params.get(name)}: expected {required.get(name)}")


def _parameterization(section: dict[str, Any], source: str | Path) -> str:
    place = "model.params.denoiser_config"
    params = params_of(section, place, (_DENOISER,), source)
    scaling, schedule = ((params.get(name) or {}).get("target") for name in ("scaling_config", "discretization_config"))
    if scaling not in _SCALINGS or schedule != _SCHEDULE or params.get("num_idx", 1000) != 1000:
        raise UserError(
            f"{source}: {place} has {scaling}, {schedule} and num_idx {params.get('num_idx')}: expected "
            f"{' or '.join(_SCALINGS)}, {_SCHEDULE} and 1000"
        )
    return _SCALINGS[scaling]


def _without_unused_depths(unet: UNetConfig) -> UNetConfig:
    """The official file gives a depth to the first level too, which has no attention."""
    return dataclasses.replace(unet, transformer_depth=unet.depths[:-1])
