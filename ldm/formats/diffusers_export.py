"""A diffusers folder of our model: unet/ vae/ text_encoder/ tokenizer/ scheduler/, which `from_pretrained` loads."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm import tokenizer
from ldm.config import ModelConfig, TextEncoderConfig
from ldm.formats.diffusers_names import to_text, to_unet, to_vae

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_PAIR = ("conditioner.embedders.0.", "conditioner.embedders.1.")  # SDXL's text encoders
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
_ONE = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
_TWO = {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def write_folder(state: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write a model of SD's names as a diffusers folder; tensors keep their precision."""
    rename = to_unet(config.unet)
    parts = {
        "unet": {rename(name): tensor for name, tensor in _part(state, _UNET).items()},
        "vae": to_vae(_part(state, _VAE), config.autoencoder),
    }
    for name, prefix, encoder in text_encoders(config):
        parts[name] = to_text(_part(state, prefix), encoder)
        _write(folder / name / "config.json", _text(config, encoder))
        write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), encoder)
    for part, tensors in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / part / f"{stem}.safetensors", {"format": "pt"})
    _write(folder / "unet/config.json", _unet(config))
    _write(folder / "vae/config.json", _vae(config))
    _write(folder / "scheduler/scheduler_config.json", _scheduler(config))
    own = _ONE if config.text_encoder_2 is None else _TWO | {"force_zeros_for_empty_prompt": config.zeros_for_empty_negative}
    _write(folder / "model_index.json", _CLASSES | own)


def text_encoders(config: ModelConfig) -> list[tuple[str, str, TextEncoderConfig]]:
    """Return (diffusers' folder, prefix of SD's names, configuration) of each text encoder."""
    if config.text_encoder_2 is None:
        return [("text_encoder", _TEXT, config.text_encoder)]
    return [("text_encoder", _PAIR[0], config.text_encoder), ("text_encoder_2", _PAIR[1], config.text_encoder_2)]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _unet(config: ModelConfig) -> dict[str, Any]:
    unet = config.unet
    widths = [int(unet.model_channels * mult) for mult in unet.channel_mult]
    cross = [2**level in unet.attention_resolutions for level in range(len(widths))]
    head, depth = unet.num_head_channels, unet.transformer_depth
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.image_size // config.autoencoder.downsampling,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        # diffusers' historical name for the number of heads
        "attention_head_dim": [width // head for width in widths] if head else unet.num_heads,
        "cross_attention_dim": unet.context_dim,
        # diffusers wants a depth where there is no attention, too.
        "transformer_layers_per_block": depth if isinstance(depth, int) else [max(blocks, 1) for blocks in depth],
        "use_linear_projection": unet.use_linear_in_transformer,
        **_vector(config),
    }


def _vector(config: ModelConfig) -> dict[str, Any]:
    """What the UNet says of the vector that SDXL is conditioned on: pooled text, and sinusoids of six numbers."""
    width, second = config.unet.adm_in_channels, config.text_encoder_2
    if width is None or second is None or second.projection is None:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - second.projection) // 6,
        "projection_class_embeddings_input_dim": width,
    }


def _vae(config: ModelConfig) -> dict[str, Any]:
    vae = config.autoencoder
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.in_channels,
        "out_channels": vae.out_ch,
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.ch_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.ch_mult),
        "layers_per_block": vae.num_res_blocks,
        "latent_channels": vae.z_channels,
        "norm_num_groups": vae.num_groups,
        "sample_size": config.image_size,
        "scaling_factor": config.latent_scale,
        "force_upcast": vae.force_upcast,
    }


def _text(config: ModelConfig, text: TextEncoderConfig) -> dict[str, Any]:
    # The pipeline of SDXL takes the layer before the last by itself, and pools the last.
    layers = text.layers if config.text_encoder_2 else text.layers - text.clip_skip + 1
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.hidden_act,
        "max_position_embeddings": text.max_length,
        "projection_dim": text.projection or text.width,
        "layer_norm_eps": 1e-5,
        # transformers would otherwise compute in the file's precision, beside a UNet in diffusers' default.
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.START,
        "eos_token_id": tokenizer.END,
        "pad_token_id": _padding(text)[1],
    }


def _scheduler(config: ModelConfig) -> dict[str, Any]:
    schedule = config.schedule
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "beta_start": schedule.linear_start,
        "beta_end": schedule.linear_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if schedule.parameterization == "v" else "epsilon",
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": config.sampling.get("spacing", "leading"),
    }


def _padding(text: TextEncoderConfig) -> tuple[str, int]:
    """The token behind the end token, and its id."""
    return ("!", 0) if text.kind == "openclip" else ("<|endoftext|>", tokenizer.END)


def write_tokenizer(folder: Path, text: TextEncoderConfig) -> None:
    """Write CLIP's tokenizer as transformers reads it, padding as a text encoder does."""
    clip = tokenizer.clip_tokenizer()
    _write(folder / "vocab.json", clip.get_vocab())
    merges = json.loads(clip.to_str())["model"]["merges"]
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    ends = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": _padding(text)[0],
    }
    _write(folder / "special_tokens_map.json", ends)
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": text.max_length, **ends},
    )
