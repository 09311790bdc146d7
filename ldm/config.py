"""Configurations: dataclasses filled from YAML files and `key.sub=value` overrides.

Every option of every program is a field of a dataclass, so an unknown key is an error (it names
the nearest known key) and a resolved configuration can be saved and read back.
"""

import contextlib
import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.shipped import find
from ldm.texts import nearest

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
    transformer_depth: Any = 1  # blocks in each spatial transformer: a number, or a list with that of each level
    context_dim: int = 768  # width of the text context
    num_head_channels: int | None = None  # width of a head (64 in SD 2.x), in place of num_heads
    use_linear_in_transformer: bool = False  # projections around the transformers: linear (SD 2.x), or 1x1 convolutions
    adm_in_channels: int | None = None  # width of the vector that is added to the timestep (2816 in SDXL); null: none

    @property
    def depths(self) -> list[int]:
        """Blocks in the spatial transformers of each level, 0 where it has none, and last those of the middle.

        Raises:
            UserError: not one number for each level.
        """
        levels, given = len(self.channel_mult), self.transformer_depth
        depths = [given] * levels if isinstance(given, int) else given
        numbers = isinstance(depths, list) and all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in depths)
        if not numbers or len(depths) != levels or depths[-1] < 1:
            raise UserError(
                f"unet.transformer_depth={given}: expected a whole number, or a list of {levels}, one for each "
                "level, the last of them 1 or more"
            )
        return [depth * (2**level in self.attention_resolutions) for level, depth in enumerate(depths)] + depths[-1:]


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
    force_upcast: bool = False  # overflows in fp16 (SDXL's), so that it is kept in fp32 where the others are in fp16

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
    final_norm: bool = True  # the context goes through the last norm; not in SDXL
    projection: int | None = None  # width of the pooled vector (openclip alone); null: there is none


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
    vae: str | None = None  # an autoencoder's file or folder, in place of the weights' own; relative like them
    image_size: int = 512  # pixels, the side that the model was trained at
    latent_scale: float = 0.18215  # latents are multiplied by this to have unit variance
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = dataclasses.field(default_factory=TextEncoderConfig)
    text_encoder_2: TextEncoderConfig | None = None  # SDXL: its context stands beside the first one's
    zeros_for_empty_negative: bool = False  # an empty negative prompt is zeros, not an empty text (SDXL)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)  # samplers' defaults; handed on unread

    @property
    def token_widths(self) -> list[int]:
        """Widths of the embeddings that a token has, one in each text encoder."""
        return [encoder.width for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def size_multiple(self) -> int:
        """What an image's sides must be multiples of, in pixels: every level of the UNet must divide the latent."""
        return self.autoencoder.downsampling * 2 ** (len(self.unet.channel_mult) - 1)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    path = find(path)
    if not path.is_file():
        raise UserError(f"no configuration file {path}: give the path of a YAML file, such as those in configs/")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as YAML ({reason}): mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected a mapping of option names to values")
    return {str(key): _mapped(_read, value) for key, value in content.items()}


def build(schema: type[T], content: dict[str, Any], overrides: Sequence[str] = (), source: str = "configuration") -> T:
    """Fill the dataclass `schema` from a mapping, then from `key.sub=value` overrides.

    Args:
        content: nested mapping, as read from YAML.
        overrides: "key.sub=value" strings, later ones win; see `overriding`.
        source: where `content` came from, for messages.

    Raises:
        UserError: a key that the schema does not have (the nearest one is named), a value of the
            wrong type, or an override without "=".
    """
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"'{override}' is not an override: expected key.sub=value, such as training.steps=200")
    config: Any = OmegaConf.structured(schema)
    known = key_names(schema)
    layers: list[tuple[Any, str]] = [(content, source)]
    layers += [(overriding(override, schema), "the command line") for override in overrides]
    for layer, origin in layers:
        _reject_unknown(layer, schema, known, origin)
        try:
            config = OmegaConf.merge(config, _mapped(_literal, layer))
        except omegaconf.errors.OmegaConfBaseException as error:
            key = error.full_key or ""
            value = OmegaConf.select(OmegaConf.create(_mapped(_literal, layer)), key)
            raise UserError(f"{origin}: {key}={value}: expected a value of type {_type_name(schema, key)}") from error
    try:
        return typing.cast(T, OmegaConf.to_object(config))
    except omegaconf.errors.MissingMandatoryValue as error:
        raise UserError(f"{source}: {error.full_key} must be given: add {error.full_key}=VALUE") from error


def overriding(override: str, schema: type) -> dict[str, Any]:
    """Return the nested mapping that a "key.sub=value" stands for.

    Where a text is expected, the value is that text, whatever characters it has: paths are data. Only null is none, and
    quotes around the whole are taken off. Other values are YAML or JSON.

    Raises:
        UserError: the value is neither.
    """
    key, _, text = override.partition("=")
    layer: Any
    try:
        layer = _value(text, _leaf(schema, key))
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, UnicodeError) as error:
        raise UserError(f"'{override}' is not an override: its value is not valid YAML") from error
    for name in reversed(key.split(".")):
        layer = {name: layer}
    return layer


def _leaf(schema: Any, key: str) -> Any:
    """The declared type of a dotted key; Any where it is not declared."""
    for name in key.split("."):
        known = {field.name: field.type for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        schema = known.get(name, Any)
    return schema


def _value(text: str, kind: Any) -> Any:
    """The value that a text stands for where `kind` is expected."""
    if kind is str or isinstance(kind, types.UnionType) and str in typing.get_args(kind):
        return None if kind is not str and text in ("", "null") else _unquoted(text)
    if text[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # as JSON, of which YAML reads \\ud83d\\ude00 otherwise
            return json.loads(text)
    if kind is not Any or text in ("", "null", "~", *_SWITCHES) or text[:1] in ("[", "{") or _NUMBER.fullmatch(text):
        return _from_yaml(text)
    return _unquoted(text)


_SWITCHES = ("true", "false", "yes", "no", "on", "off", "True", "False")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _from_yaml(text: str) -> Any:
    content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return content["value"]


def _unquoted(text: str) -> str:
    """A text without the quotes around it, unless it is the name of a file."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or os.path.exists(text):
        return text
    with contextlib.suppress(yaml.YAMLError):
        value = _from_yaml(text)
        return value if isinstance(value, str) else text
    return text


def _mapped(change: Callable[[str], str], value: Any) -> Any:
    """A nested value with its texts changed."""
    if isinstance(value, dict):
        return {key: _mapped(change, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_mapped(change, entry) for entry in value]
    return change(value) if isinstance(value, str) else value


def _literal(text: str) -> str:
    """A text in which OmegaConf finds no interpolations: ${...} is text."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


# Python keeps a name's bytes that are not UTF-8 as U+DC80 to U+DCFF, which YAML cannot hold: written, they are private
# characters.
_TO_PRIVATE = {byte: byte + 0x100000 for byte in range(0xDC80, 0xDD00)}
_FROM_PRIVATE = {private: byte for byte, private in _TO_PRIVATE.items()}


def _read(text: str) -> str:
    return text.translate(_FROM_PRIVATE)


def _written(text: str) -> str:
    return _literal(text).translate(_TO_PRIVATE)


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass `schema` from a YAML file and overrides; see `build`."""
    return build(schema, read_yaml(path), overrides, source=str(path))


def to_yaml(config: Any) -> str:
    """Return a dataclass as YAML, in a form that `load` reads back."""
    text = yaml.dump(_mapped(_written, dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return str(text)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that OmegaConf, unlike PyYAML, takes for numbers."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.match(r"[-+.\d]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def save(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML, in a form that `load` reads back."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def key_names(schema: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a dataclass, nested ones included."""
    names = []
    for field in dataclasses.fields(schema):
        names.append(prefix + field.name)
        if section := _section(field.type):
            names += key_names(section, prefix + field.name + ".")
    return names


def _section(kind: Any) -> Any:
    """The dataclass that a field's type is, by itself or beside None."""
    if typing.get_origin(kind) is list:
        return None
    return next(filter(dataclasses.is_dataclass, (kind, *typing.get_args(kind))), None)


def _type_name(schema: Any, key: str) -> str:
    """Return the declared type of a dotted key, as it is written in the dataclass."""
    for name in key.split("."):
        name = name.partition("[")[0]
        schema = {field.name: field.type for field in dataclasses.fields(_section(schema) or schema)}[name]
    return getattr(schema, "__name__", "") if isinstance(schema, type) and not hasattr(schema, "__args__") else str(schema)


def _reject_unknown(layer: dict, schema: Any, known: list[str], origin: str, prefix: str = "") -> None:
    """Raise UserError for the first key of `layer` that `schema` lacks, naming the nearest."""
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in fields:
            leaf = [k for k in known if k.rsplit(".", 1)[-1] == str(key)]
            near = leaf[0] if leaf else nearest(name, known)
            hint = f"; did you mean '{near}'?" if near else f": expected one of {', '.join(fields)}"
            raise UserError(f"{origin}: unknown key '{name}'{hint}")
        _check_container(value, fields[key], f"{origin}: {name}={value}")
        if isinstance(value, dict) and (section := _section(fields[key])):
            _reject_unknown(value, section, known, origin, name + ".")
        for section in filter(dataclasses.is_dataclass, typing.get_args(fields[key])):  # a list of sections
            for i, entry in enumerate(value if isinstance(value, list) else []):
                if isinstance(entry, dict):
                    prefixed = key_names(section, f"{name}[{i}].")
                    _reject_unknown(entry, section, prefixed, origin, f"{name}[{i}].")


def _check_container(value: Any, kind: Any, given: str) -> None:
    """Raise UserError for a value in place of a section or a list, and for lists within a list of values."""
    if value is None or value == "???":
        return
    if (section := _section(kind)) and not isinstance(value, dict):
        raise UserError(f"{given}: expected a section with options such as {key_names(section)[0]}")
    of = next((one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is list), None)
    if of is None:
        return
    entries = value if isinstance(value, list) else [None]
    if any(dataclasses.is_dataclass(entry) for entry in typing.get_args(of)):
        if not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{given}: expected a list of sections, [{{OPTION: VALUE, ...}}, ...]")
    elif not isinstance(value, list) or any(isinstance(entry, (list, dict)) for entry in entries):
        raise UserError(f"{given}: expected a value of type {of}")


def project_root(config_path: str | Path) -> Path:
    """Return the folder that paths inside a configuration are relative to.

    It is the folder that holds the `configs` folder above the file, or the file's own folder when
    there is none.
    """
    path = find(config_path).resolve()
    for parent in path.parents:
        if parent.name == "configs":
            return parent.parent
    return path.parent
