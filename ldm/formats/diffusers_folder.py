"""Folders as diffusers saves them: unet/ vae/ text_encoder/ tokenizer/ scheduler/, each with its configuration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm import config as configuration
from ldm import tokenizer
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from ldm.errors import UserError
from ldm.formats import diffusers_names as names
from ldm.formats import presets

PARTS = ("unet", "vae", "text_encoder")
SECOND = "text_encoder_2"  # of SDXL
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

# What our networks are built like; a folder that says otherwise holds another architecture. Left out: the default.
_UNET = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "num_attention_heads": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "reverse_transformer_layers_per_block": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
_VAE = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_TEXT = {"layer_norm_eps": 1e-5}
_SCHEDULER = {"beta_schedule": "scaled_linear", "trained_betas": None}


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder looks like one of diffusers."""
    return (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file()


def read_config(folder: Path) -> ModelConfig:
    """Return the model configuration that a diffusers folder describes.

    Raises:
        UserError: a part is missing, or is of an architecture that is not Stable Diffusion 1.x or 2.x.
    """
    try:
        config = _read_config(folder)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{folder} is not configured as diffusers saves it ({error}): fetch it anew") from error
    return configuration.build(ModelConfig, dataclasses.asdict(config), source=str(folder))  # checks the values' types


def _read_config(folder: Path) -> ModelConfig:
    index = folder / "model_index.json"
    pipeline = (
        read_json(index).get("_class_name", "pipeline without a name") if index.is_file() else "StableDiffusionPipeline"
    )
    if not str(pipeline).startswith("StableDiffusion") or str(pipeline).startswith("StableDiffusion3"):
        raise UserError(f"{folder} holds a {pipeline}: expected Stable Diffusion 1.x, 2.x or XL")
    if (folder / SECOND).is_dir() and not (folder / "text_encoder").is_dir():
        raise UserError(f"{folder} holds the SDXL refiner, which refines images of the base model: expected SDXL base")
    for part in (*PARTS, "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}/: expected {', '.join(PARTS)} and scheduler")
    autoencoder, latent_scale = _autoencoder(folder / "vae" / "config.json")
    unet, cells = _unet(folder / "unet" / "config.json")
    text = _text_encoder(folder)
    schedule, sampling = _schedule(folder / "scheduler" / "scheduler_config.json")
    name = "sd-v1" if text.kind == "clip" else "sd-v2-v" if schedule.parameterization == "v" else "sd-v2"
    config = ModelConfig(
        name=name,
        image_size=cells * autoencoder.downsampling,
        latent_scale=latent_scale,
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text,
        schedule=schedule,
        sampling=presets.sampling() | sampling,
    )
    xl = (folder / SECOND).is_dir()
    if xl != bool(unet.adm_in_channels):
        what = "lacks" if unet.adm_in_channels else "has"
        raise UserError(f"{folder} {what} the folder {SECOND}/, and its UNet says otherwise: fetch the whole folder")
    return _with_second(folder, config) if xl else config


def _with_second(folder: Path, config: ModelConfig) -> ModelConfig:
    """Add what SDXL has besides: a second text encoder, and both of them read before their last layer."""
    index = folder / "model_index.json"
    zeros = read_json(index).get("force_zeros_for_empty_prompt", True) if index.is_file() else True
    upcast = read_json(folder / "vae" / "config.json").get("force_upcast", True)
    file = folder / SECOND / "config.json"
    second = dataclasses.replace(_text_encoder(folder, "_2"), projection=_get(file, read_json(file), "projection_dim"))
    return dataclasses.replace(
        config,
        name="sdxl",
        autoencoder=dataclasses.replace(config.autoencoder, force_upcast=upcast),
        text_encoder=dataclasses.replace(config.text_encoder, clip_skip=2, final_norm=False),
        text_encoder_2=dataclasses.replace(second, clip_skip=2, final_norm=False),
        zeros_for_empty_negative=zeros,
    )


def parts_of(folder: Path) -> tuple[str, ...]:
    """The folders of a model's networks."""
    return (*PARTS, SECOND) if (folder / SECOND).is_dir() else PARTS


def read_state(folder: Path, config: ModelConfig, half: bool, read: Any) -> dict[str, Tensor]:
    """Return a diffusers folder's tensors under SD's names.

    Args:
        config: as `read_config` returns it, for the number of levels and blocks.
        half: take the fp16 variant where both are there; without one, what there is.
        read: (file) -> its state dict.

    Raises:
        UserError: a part of the model has no weights.
    """
    parts = {}
    for part in parts_of(folder):
        files = find_weights(folder / part, half)
        if not files:
            raise UserError(f"{folder / part} holds no weights: expected {_STEMS[0]}.safetensors or the like")
        parts[part] = {name: tensor for file in files for name, tensor in read(file).items()}
    state = names.unet_names(parts["unet"], config.unet) | names.vae_names(parts["vae"], config.autoencoder)
    if config.text_encoder_2 is None or SECOND not in parts:
        return state | names.text_names(parts["text_encoder"], config.text_encoder)
    first = names.text_names(parts["text_encoder"], config.text_encoder, "conditioner.embedders.0.")
    return state | first | names.text_names(parts[SECOND], config.text_encoder_2, "conditioner.embedders.1.")


def find_weights(folder: Path, half: bool = False) -> list[Path]:
    """Return the files that hold one network, [] if there are none.

    .safetensors come before .bin, and of the two precisions the one that is asked for.
    """
    variants = (".fp16", "") if half else ("", ".fp16")
    for suffix in ("safetensors", "bin"):
        for variant in variants:
            for stem in _STEMS:
                whole = folder / f"{stem}{variant}.{suffix}"
                if whole.is_file():
                    return [whole]
                # diffusers and transformers put the variant at different places of the index's name.
                for index in (f"{stem}.{suffix}.index{variant}.json", f"{stem}{variant}.{suffix}.index.json"):
                    if (folder / index).is_file():
                        return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    content = read_json(index).get("weight_map")
    listed = sorted(set(content.values())) if isinstance(content, dict) else []
    for name in listed:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index} names the file {name}, which is not beside it: fetch the whole folder")
    if not listed:
        raise UserError(f"{index} names no files: fetch it anew")
    return [index.parent / name for name in listed]


def read_json(file: Path) -> dict[str, Any]:
    """Return the mapping in a configuration's file.

    Raises:
        UserError: it is missing, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {file}: expected a folder as diffusers saves it") from error
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: fetch it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, expected a mapping")
    return content


def _require(file: Path, content: dict[str, Any], required: dict[str, Any]) -> None:
    for key, value in required.items():
        if content.get(key, value) != value:
            raise UserError(f"{file}: {key}={content[key]}: expected {value}, as in Stable Diffusion 1.x and 2.x")


def _get(file: Path, content: dict[str, Any], key: str) -> Any:
    if content.get(key) is None:
        raise UserError(f"{file} lacks {key}")
    return content[key]


def _same(file: Path, key: str, value: Any) -> Any:
    """The one value of an option that may be a list over levels."""
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UserError(f"{file}: {key}={value}: expected the same at all levels")
    return values.pop()


def _unet(file: Path) -> tuple[UNetConfig, int]:
    """The UNet's configuration, and the latent cells along the side that it was trained at."""
    content = read_json(file)
    _require(file, content, _UNET)
    channels = _get(file, content, "in_channels")
    if channels != 4:
        raise UserError(f"{file}: in_channels={channels}: expected 4; models with image or depth inputs are not supported")
    widths, down = _get(file, content, "block_out_channels"), _get(file, content, "down_block_types")
    attention = [kind == "CrossAttnDownBlock2D" for kind in down]
    up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attention)]
    if set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"} or content.get("up_block_types", up) != up:
        raise UserError(f"{file}: {down}, {content.get('up_block_types')}: expected Stable Diffusion's blocks")
    heads = content.get("attention_head_dim", 8)  # diffusers' historical name for the number of heads
    if isinstance(heads, list):  # SD 2.x: as many heads in each level as make them equally wide
        head = _same(file, "channels per head", [width / h for width, h in zip(widths, heads, strict=True)])
        shape = {"num_head_channels": int(head)}
    else:
        shape = {"num_heads": heads}
    unet = UNetConfig(
        out_channels=content.get("out_channels", 4),
        model_channels=widths[0],
        num_res_blocks=_same(file, "layers_per_block", content.get("layers_per_block", 2)),
        attention_resolutions=[2**level for level, cross in enumerate(attention) if cross][::-1],
        channel_mult=[width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        transformer_depth=_depth(attention, content.get("transformer_layers_per_block", 1)),
        adm_in_channels=_vector_width(file, content),
        context_dim=_same(file, "cross_attention_dim", _get(file, content, "cross_attention_dim")),
        use_linear_in_transformer=content.get("use_linear_projection", False),
        **shape,
    )
    return unet, _get(file, content, "sample_size")


def _depth(attention: list[bool], depth: Any) -> Any:
    """Blocks of the transformers: one number, or one for each level, 0 where there is no attention."""
    if not isinstance(depth, list):
        return depth
    if len(set(depth)) == 1:
        return depth[0]
    return [number * cross for number, cross in zip(depth, attention, strict=True)]


def _vector_width(file: Path, content: dict[str, Any]) -> int | None:
    """Width of the vector that SDXL is conditioned on; None: no such vector."""
    kind = content.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise UserError(f"{file}: addition_embed_type={kind}: expected text_time (SDXL), or none")
    return _get(file, content, "projection_class_embeddings_input_dim") if kind else None


def _autoencoder(file: Path) -> tuple[AutoencoderConfig, float]:
    """The autoencoder's configuration, and the scale of the latents."""
    content = read_json(file)
    _require(file, content, _VAE)
    widths = _get(file, content, "block_out_channels")
    channels = content.get("latent_channels", 4)
    autoencoder = AutoencoderConfig(
        in_channels=content.get("in_channels", 3),
        out_ch=content.get("out_channels", 3),
        ch=widths[0],
        ch_mult=[width // widths[0] for width in widths],
        num_res_blocks=content.get("layers_per_block", 1),
        z_channels=channels,
        embed_dim=channels,
        num_groups=content.get("norm_num_groups", 32),
    )
    return autoencoder, content.get("scaling_factor", ModelConfig.latent_scale)


def _text_encoder(folder: Path, suffix: str = "") -> TextEncoderConfig:
    file = folder / f"text_encoder{suffix}" / "config.json"
    content = read_json(file)
    _require(file, content, _TEXT)
    activation = content.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"{file}: hidden_act={activation}: expected quick_gelu (SD 1.x) or gelu (SD 2.x)")
    kind = "openclip" if activation == "gelu" else "clip"
    _check_tokenizer(folder / f"tokenizer{suffix}", "!" if kind == "openclip" else "<|endoftext|>")
    vocabulary = content.get("vocab_size", tokenizer.VOCAB_SIZE)
    if vocabulary != tokenizer.VOCAB_SIZE:
        raise UserError(
            f"{file}: vocab_size={vocabulary}: expected {tokenizer.VOCAB_SIZE}; models with added tokens are not supported"
        )
    return TextEncoderConfig(
        kind=kind,
        width=_get(file, content, "hidden_size"),
        layers=_get(file, content, "num_hidden_layers"),
        heads=_get(file, content, "num_attention_heads"),
        mlp_width=_get(file, content, "intermediate_size"),
        hidden_act=activation,
        max_length=content.get("max_position_embeddings", tokenizer.MAX_LENGTH),
    )


def _check_tokenizer(folder: Path, pad: str) -> None:
    """Refuse a tokenizer that pads otherwise than the text encoder of that kind; ours needs no files."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name).get("pad_token")
        found = found.get("content") if isinstance(found, dict) else found
        if found not in (None, pad):
            raise UserError(f"{folder / name}: pad_token={found}: expected {pad} with this text encoder")


def _schedule(file: Path) -> tuple[ScheduleConfig, dict[str, str]]:
    """The schedule, and the samplers' defaults that follow from it."""
    content = read_json(file)
    _require(file, content, _SCHEDULER)
    kinds = {"epsilon": "eps", "v_prediction": "v"}
    kind = content.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"{file}: prediction_type={kind}: expected one of {', '.join(kinds)}")
    schedule = ScheduleConfig(
        timesteps=content.get("num_train_timesteps", 1000),
        linear_start=_get(file, content, "beta_start"),
        linear_end=_get(file, content, "beta_end"),
        parameterization=kinds[kind],
        zero_terminal_snr=bool(content.get("rescale_betas_zero_snr", False)),
    )
    return schedule, {"spacing": "trailing"} if content.get("timestep_spacing") == "trailing" else {}
