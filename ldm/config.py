"""Configurations: dataclasses filled from YAML files and `key.sub=value` overrides.

Every option of every program is a field of a dataclass, so an unknown key is an error (it names
the nearest known key) and a resolved configuration can be saved and read back.
"""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from ldm.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass
class UNetConfig:
    """Shape of the denoising UNet; the defaults are Stable Diffusion 1.x."""

    in_channels: int = 4  # channels of the latent
    out_channels: int = 4
    model_channels: int = 320  # width of the first level
    num_res_blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: list[int] = dataclasses.field(default_factory=lambda: [4, 2, 1])  # downsampling factors
    channel_mult: list[int | float] = dataclasses.field(default_factory=lambda: [1, 2, 4, 4])  # width of each level
    num_heads: int = 8
    transformer_depth: int = 1  # blocks in each spatial transformer
    context_dim: int = 768  # width of the text context
    num_head_channels: int | None = None  # width of a head (64 in SD 2.x), in place of num_heads
    use_linear_in_transformer: bool = False  # projections around the transformers: linear (SD 2.x), or 1x1 convolutions


@dataclasses.dataclass
class AutoencoderConfig:
    """Shape of the AutoencoderKL; the defaults are Stable Diffusion 1.x and 2.x."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128  # width at full resolution
    ch_mult: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 4])  # f = 2 ** (len - 1)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    num_groups: int = 32  # of the group norms; must divide every width

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one axis (8 in Stable Diffusion)."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass
class TextEncoderConfig:
    """Shape of the text transformer; the defaults are CLIP ViT-L/14's."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    hidden_act: str = "quick_gelu"
    vocab_size: int = 49408
    max_length: int = 77
    kind: str = "clip"  # clip (transformers' names, SD 1.x) or openclip (open_clip's names, padded with 0, SD 2.x)
    clip_skip: int = 1  # 1: all layers; 2: without the last one; ...


@dataclasses.dataclass
class ScheduleConfig:
    """Noise schedule: betas linear in their square roots."""

    timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    parameterization: str = "eps"  # what the UNet predicts: eps (noise) or v (Salimans & Ho 2022)
    zero_terminal_snr: bool = False  # the last timestep is pure noise (Lin et al. 2024)


@dataclasses.dataclass
class ModelConfig:
    """A latent diffusion model: its parts, its scale, and where its weights are."""

    name: str = "sd-v1"
    checkpoint: str | None = None  # weights in any format; relative to the configuration's project
    image_size: int = 512  # pixels, the side that the model was trained at
    latent_scale: float = 0.18215  # latents are multiplied by this to have unit variance
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = dataclasses.field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)  # samplers' defaults; handed on unread

    @property
    def size_multiple(self) -> int:
        """What a picture's sides must be multiples of, in pixels: every level of the UNet must divide the latent."""
        return self.autoencoder.downsampling * 2 ** (len(self.unet.channel_mult) - 1)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no configuration file {path}: give the path of a YAML file, such as those in configs/")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as YAML ({reason}): mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected a mapping of option names to values")
    return content


def build(schema: type[T], content: dict[str, Any], overrides: list[str] = (), source: str = "configuration") -> T:
    """Fill the dataclass `schema` from a mapping, then from `key.sub=value` overrides.

    Args:
        content: nested mapping, as read from YAML.
        overrides: "key.sub=value" strings, later ones win; values are YAML.
        source: where `content` came from, for messages.

    Raises:
        UserError: a key that the schema does not have (the nearest one is named), a value of the
            wrong type, or an override without "=".
    """
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"'{override}' is not an override: expected key.sub=value, such as training.steps=200")
    config = OmegaConf.structured(schema)
    known = key_names(schema)
    layers = [(content, source)]
    for override in overrides:
        try:
            layers.append((OmegaConf.to_container(OmegaConf.from_dotlist([override])), "the command line"))
        except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
            raise UserError(f"'{override}' is not an override: its value is not valid YAML") from error
    for layer, origin in layers:
        _reject_unknown(layer, schema, known, origin)
        try:
            config = OmegaConf.merge(config, layer)
        except omegaconf.errors.OmegaConfBaseException as error:
            value, kind = OmegaConf.select(OmegaConf.create(layer), error.full_key), _type_name(schema, error.full_key)
            raise UserError(f"{origin}: {error.full_key}={value}: expected a value of type {kind}") from error
    try:
        return OmegaConf.to_object(config)
    except omegaconf.errors.MissingMandatoryValue as error:
        raise UserError(f"{source}: {error.full_key} must be given: add {error.full_key}=VALUE") from error


def load(schema: type[T], path: str | Path, overrides: list[str] = ()) -> T:
    """Fill the dataclass `schema` from a YAML file and overrides; see `build`."""
    return build(schema, read_yaml(path), overrides, source=str(path))


def to_yaml(config: Any) -> str:
    """Return a dataclass as YAML, in a form that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def save(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML, in a form that `load` reads back."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def key_names(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a dataclass, nested ones included."""
    names = []
    for field in dataclasses.fields(schema):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names += key_names(field.type, prefix + field.name + ".")
    return names


def _type_name(schema: type, key: str) -> str:
    """Return the declared type of a dotted key, as it is written in the dataclass."""
    for name in key.split("."):
        name = name.partition("[")[0]
        schema = {field.name: field.type for field in dataclasses.fields(schema)}[name]
    return getattr(schema, "__name__", "") if isinstance(schema, type) and not hasattr(schema, "__args__") else str(schema)


def _reject_unknown(layer: dict, schema: type, known: list[str], origin: str, prefix: str = "") -> None:
    """Raise UserError for the first key of `layer` that `schema` lacks, naming the nearest."""
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            leaf = [k for k in known if k.rsplit(".", 1)[-1] == str(key)]
            raise UserError(f"{origin}: unknown key '{name}'; did you mean '{leaf[0] if leaf else near}'?")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            _reject_unknown(value, fields[key], known, origin, name + ".")
        for section in filter(dataclasses.is_dataclass, typing.get_args(fields[key])):  # a list of sections
            for i, entry in enumerate(value if isinstance(value, list) else []):
                if isinstance(entry, dict):
                    prefixed = key_names(section, f"{name}[{i}].")
                    _reject_unknown(entry, section, prefixed, origin, f"{name}[{i}].")


def project_root(config_path: str | Path) -> Path:
    """Return the folder that paths inside a configuration are relative to.

    It is the folder that holds the `configs` folder above the file, or the file's own folder when
    there is none.
    """
    path = Path(config_path).resolve()
    for parent in path.parents:
        if parent.name == "configs":
            return parent.parent
    return path.parent
