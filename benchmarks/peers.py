"""Models to measure: ours, with random weights where there are none to load, and diffusers' with the same weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_model, load_weights
from ldm.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats import presets

ROOT = Path(__file__).resolve().parent.parent


def random_weight(shape: torch.Size) -> Tensor:
    """A weight that keeps the scale of what passes, nowhere zero or one; fp16 holds it exactly, so that files in both
    precisions hold the same model."""
    if len(shape) < 2:
        return (1 + 0.1 * torch.randn(shape)).half().float()
    return (0.5 * torch.randn(shape) * math.prod(shape[1:]) ** -0.5).half().float()


def build(name: str, dtype: torch.dtype, device: str, size: int | None = None) -> LatentDiffusion:
    """Return the embedded model ("tiny"), or one of Stable Diffusion's size with random weights ("sd-v1").

    Args:
        size: side of its images in pixels; None: the model's own.

    Raises:
        UserError: the model has no images of that size.
    """
    if name == "tiny":
        model = load_model(ROOT / "configs/model/tiny.yaml", dtype=dtype)
    else:
        with torch.device("meta"):
            model = LatentDiffusion(presets.sd_v1())
    if size is not None and size % model.config.size_multiple:
        raise UserError(f"--size {size}: expected a multiple of {model.config.size_multiple} pixels for the model '{name}'")
    model.config.image_size = size or model.config.image_size
    if name != "tiny":
        state = {name: random_weight(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}
        load_weights(model, state, "random weights", dtype)
    return model.to(device).eval().requires_grad_(False)


@dataclass
class Theirs:
    """diffusers' and transformers' networks."""

    unet: nn.Module
    vae: nn.Module
    text: nn.Module


def with_weights_of(model: LatentDiffusion) -> Theirs:
    """Return diffusers' networks of the same shape, on the same tensors (CLIP's text encoder only)."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    config, state = model.config, model.state_dict()
    unet = empty(diffusers_unet(config.unet, config.image_size // config.autoencoder.downsampling))
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(state), unet.config), assign=True)
    vae = empty(diffusers_vae(config.autoencoder))
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(state), vae.config), assign=True)
    text = transformers_text(config.text_encoder)
    own = "text_model." if any(name.startswith("text_model.") for name in text.state_dict()) else ""
    prefix = "cond_stage_model.transformer.text_model."
    named = {own + name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    text.load_state_dict(named, assign=True)
    networks = [network.to(model.device).eval().requires_grad_(False) for network in (unet, vae, text)]
    return Theirs(*networks)


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build()


def diffusers_unet(config: UNetConfig, side: int, size_width: int = 256) -> Callable[[], nn.Module]:
    """Return what builds diffusers' UNet of our configuration, for latents of side x side.

    Args:
        size_width: of the sinusoids of the image's size, in SDXL's.
    """
    from diffusers import UNet2DConditionModel

    widths = [int(config.model_channels * mult) for mult in config.channel_mult]
    cross = [2**i in config.attention_resolutions for i in range(len(widths))]
    width = config.num_head_channels
    vector = {}
    if config.adm_in_channels:
        vector = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_width,
            "projection_class_embeddings_input_dim": config.adm_in_channels,
        }
    return lambda: UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        attention_head_dim=[w // width for w in widths] if width else config.num_heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.use_linear_in_transformer,
        transformer_layers_per_block=[max(depth, 1) for depth in config.depths[:-1]],
        **vector,
    )


def diffusers_vae(config: AutoencoderConfig) -> Callable[[], nn.Module]:
    """Return what builds diffusers' autoencoder of our configuration."""
    from diffusers import AutoencoderKL

    widths = [config.ch * mult for mult in config.ch_mult]
    return lambda: AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.num_groups,
        sample_size=32,
    )


def transformers_text(config: TextEncoderConfig, vocabulary: int | None = None) -> nn.Module:
    """Return transformers' CLIP text model of our configuration, with a projection where it has one; random weights.

    Args:
        vocabulary: tokens, if other than the configuration's.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    return network(
        CLIPTextConfig(
            vocab_size=vocabulary or config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.hidden_act,
            projection_dim=config.projection or config.width,
        )
    )


def diffusers_scheduler(**options):
    """Return diffusers' DDIM as Stable Diffusion is sampled with.

    Args:
        options: further ones, such as prediction_type.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )
