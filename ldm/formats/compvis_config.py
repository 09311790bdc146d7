"""The YAML files of CompVis and Stability AI (`model: target/params`), as their repositories ship them.

A target is a name to look up in the tables here; nothing is imported by it. Every key is known to be
needed, to have one value that our networks are built for, or to belong to training alone.
"""

from pathlib import Path
from typing import Any

from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from ldm.errors import UserError
from ldm.formats import presets
from ldm.texts import did_you_mean

_LATENT_DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
SGM_UNET = "sgm.modules.diffusionmodules.openaimodel.UNetModel"
_AUTOENCODER = "ldm.models.autoencoder.AutoencoderKL"
_CLIP = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
_OPENCLIP = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"

TRAINING_ONLY = {
    _LATENT_DIFFUSION: {
        "base_learning_rate",
        "num_timesteps_cond",
        "log_every_t",
        "first_stage_key",
        "cond_stage_key",
        "cond_stage_trainable",
        "monitor",
        "use_ema",
        "scheduler_config",
        "personalization_config",
        "ignore_keys",
        "load_only_unet",
        "loss_type",
        "unfreeze_model",
        "model_lr",
        "l_simple_weight",
        "original_elbo_weight",
        "v_posterior",
        "learn_logvar",
        "logvar_init",
        "clip_denoised",
        "use_positional_encodings",
        "concat_mode",
        "ucg_training",
        "make_it_fit",
        "cond_stage_forward",
        "reset_ema",
        "reset_num_ema_updates",
    },
    _UNET: {
        "image_size",
        "use_checkpoint",
        "use_fp16",
        "use_bf16",
        "legacy",
        "use_new_attention_order",
        "num_heads_upsample",
    },
    SGM_UNET: {"use_checkpoint", "use_fp16", "legacy", "spatial_transformer_attn_type", "image_size"},
    _AUTOENCODER: {"monitor", "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels"},
    "ddconfig": {"resolution"},
    _CLIP: {"device", "freeze"},
    _OPENCLIP: {"device", "freeze", "version"},
}
"""By target, the keys that change nothing in a trained model."""

REQUIRED: dict[str, dict[str, Any]] = {
    _LATENT_DIFFUSION: {
        "conditioning_key": "crossattn",
        "beta_schedule": "linear",
        "scale_by_std": False,
        "cosine_s": 8e-3,
        "given_betas": None,
        "num_timesteps_cond": 1,
    },
    _UNET: {
        "use_spatial_transformer": True,
        "dropout": 0,
        "conv_resample": True,
        "dims": 2,
        "num_classes": None,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "n_embed": None,
        "disable_self_attentions": None,
        "num_attention_blocks": None,
        "disable_middle_self_attn": False,
        "adm_in_channels": None,
    },
    SGM_UNET: {
        "use_spatial_transformer": True,
        "dropout": 0,
        "conv_resample": True,
        "dims": 2,
        "num_classes": "sequential",
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "disable_self_attentions": None,
        "num_attention_blocks": None,
        "disable_middle_self_attn": False,
        "transformer_depth_middle": None,
    },
    _AUTOENCODER: {},
    "ddconfig": {"double_z": True, "attn_resolutions": [], "dropout": 0, "resamp_with_conv": True, "use_linear_attn": False},
    _CLIP: {"version": "openai/clip-vit-large-patch14", "layer": "last", "layer_idx": None, "max_length": 77},
    _OPENCLIP: {"arch": "ViT-H-14", "max_length": 77},
}
"""By target, the keys with one value that our networks are built for; it is also what leaving them out means."""


def is_compvis_config(content: dict[str, Any]) -> bool:
    """Whether a YAML file's mapping is of this form."""
    return isinstance(content.get("model"), dict) and "target" in content["model"]


def convert(content: dict[str, Any], source: str | Path) -> ModelConfig:
    """Return the model configuration that an official YAML file describes.

    Args:
        content: the file's mapping; sections other than `model` (data, lightning) belong to training.
        source: the file, for messages.

    Raises:
        UserError: a target or key that is not known, or a value that our networks are not built for.
    """
    params = params_of(content["model"], "model", (_LATENT_DIFFUSION,), source)
    read = Reader(params, _LATENT_DIFFUSION, "model.params", source)
    unet = read_unet(read.section("unet_config"), "model.params.unet_config", _UNET, source)
    autoencoder = read_autoencoder(read.section("first_stage_config"), (_AUTOENCODER,), source)
    text = _text_encoder(read.section("cond_stage_config"), source)
    parameterization = read.option("parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise UserError(f"{source}: parameterization {parameterization}: expected eps or v")
    config = ModelConfig(
        name="sd-v1" if text.kind == "clip" else "sd-v2-v" if parameterization == "v" else "sd-v2",
        checkpoint=read.option("ckpt_path", None),
        image_size=read.option("image_size", 64) * autoencoder.downsampling,  # the file counts latent cells
        latent_scale=read.option("scale_factor", 1.0),
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text,
        schedule=ScheduleConfig(
            timesteps=read.option("timesteps", 1000),
            linear_start=read.option("linear_start", 1e-4),
            linear_end=read.option("linear_end", 2e-2),
            parameterization=parameterization,
        ),
        sampling=presets.sampling(),
    )
    channels = read.option("channels", unet.in_channels)
    if channels != unet.in_channels or unet.in_channels != autoencoder.embed_dim:
        raise UserError(f"{source}: a UNet of {unet.in_channels} channels: models with further inputs are not supported")
    read.finish()
    return config


class Reader:
    """Takes known keys out of a mapping; `finish` refuses what is left."""

    def __init__(self, params: dict[str, Any], target: str, place: str, source: str | Path):
        self.left, self.target, self.place, self.source = dict(params), target, place, source
        self.known = set(TRAINING_ONLY[target]) | set(REQUIRED[target])

    def option(self, key: str, default: Any) -> Any:
        """Take a key out."""
        self.known.add(key)
        return self.left.pop(key, default)

    def section(self, key: str) -> dict[str, Any]:
        """Take a mapping out, which must be there."""
        found = self.option(key, None)
        if not isinstance(found, dict):
            raise UserError(f"{self.source} lacks {self.place}.{key}: expected a mapping, as in the official files")
        return found

    def finish(self) -> None:
        """Raise UserError for what is left and must not be."""
        required = REQUIRED[self.target]
        for key, value in self.left.items():
            if key in required and value != required[key]:
                raise UserError(f"{self.source}: {self.place}.{key}={value}: expected {required[key]}")
            if key not in self.known:
                near = did_you_mean(str(key), sorted(self.known))
                raise UserError(f"{self.source}: unknown key '{self.place}.{key}'{near}")


def params_of(section: dict[str, Any], place: str, targets: tuple[str, ...], source: str | Path) -> dict[str, Any]:
    """Return the params of a `target/params` section whose target is one of `targets`."""
    target = section.get("target")
    if target not in targets:
        raise UserError(f"{source}: unknown target '{target}' in {place}: expected {' or '.join(targets)}")
    further = sorted(set(section) - {"target", "params", "base_learning_rate"})
    if further:
        raise UserError(f"{source}: unknown key '{place}.{further[0]}'; did you mean 'params'?")
    params = section.get("params") or {}
    if not isinstance(params, dict):
        raise UserError(f"{source}: {place}.params holds {type(params).__name__}, expected a mapping")
    return params


def read_unet(section: dict[str, Any], place: str, target: str, source: str | Path) -> UNetConfig:
    """Return the configuration that a UNet's section describes.

    Args:
        place: of the section in the file, for messages.
        target: the name that the section must have.

    Raises:
        UserError: as for `convert`.
    """
    read = Reader(params_of(section, place, (target,), source), target, place + ".params", source)
    if target == _UNET:
        read.left.setdefault("use_spatial_transformer", False)  # what leaving it out means there
    defaults = UNetConfig()
    heads, width = read.option("num_heads", -1), read.option("num_head_channels", -1)
    if (heads == -1) == (width == -1):
        raise UserError(f"{source}: {place}.params: expected either num_heads or num_head_channels")
    shape = {"num_heads": heads} if width == -1 else {"num_head_channels": width}
    widths = ("in_channels", "out_channels", "model_channels")
    names = (*widths, "num_res_blocks", "attention_resolutions", "channel_mult", "context_dim")
    missing = [name for name in names if name not in read.left]
    if missing:
        raise UserError(f"{source} lacks {place}.params.{missing[0]}")
    unet = UNetConfig(
        **{name: read.option(name, None) for name in names},
        transformer_depth=read.option("transformer_depth", 1),
        adm_in_channels=read.option("adm_in_channels", None) if target == SGM_UNET else None,
        use_linear_in_transformer=read.option("use_linear_in_transformer", defaults.use_linear_in_transformer),
        **shape,
    )
    read.finish()
    return unet


def read_autoencoder(section: dict[str, Any], targets: tuple[str, ...], source: str | Path) -> AutoencoderConfig:
    """Return the configuration that an autoencoder's section describes.

    Args:
        targets: the names that the section may have.

    Raises:
        UserError: as for `convert`.
    """
    place = "model.params.first_stage_config"
    outer = Reader(params_of(section, place, targets, source), _AUTOENCODER, place + ".params", source)
    inner = Reader(outer.section("ddconfig"), "ddconfig", place + ".params.ddconfig", source)
    names = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels")
    missing = [name for name in names if name not in inner.left]
    if missing:
        raise UserError(f"{source} lacks {place}.params.ddconfig.{missing[0]}")
    shape = {name: inner.option(name, None) for name in names}
    autoencoder = AutoencoderConfig(**shape, embed_dim=outer.option("embed_dim", shape["z_channels"]))
    attention = inner.option("attn_type", "vanilla")
    if attention not in ("vanilla", "vanilla-xformers"):
        raise UserError(f"{source}: {place}.params.ddconfig.attn_type={attention}: expected vanilla")
    inner.finish()
    outer.finish()
    return autoencoder


def _text_encoder(section: dict[str, Any], source: str | Path) -> TextEncoderConfig:
    place = "model.params.cond_stage_config"
    params = params_of(section, place, (_CLIP, _OPENCLIP), source)
    target = section["target"]
    read = Reader(params, target, place + ".params", source)
    if target == _CLIP:
        read.finish()
        return TextEncoderConfig()
    layer = read.option("layer", "last")
    if layer not in ("last", "penultimate"):
        raise UserError(f"{source}: {place}.params.layer={layer}: expected last or penultimate")
    read.finish()
    return presets.openclip_vit_h(layers=24 if layer == "last" else 23)
