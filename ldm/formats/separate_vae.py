"""An autoencoder in a file of its own: CompVis' and diffusers' names, alone or in a whole model."""

from pathlib import Path

from torch import Tensor

from ldm.config import AutoencoderConfig
from ldm.errors import UserError
from ldm.formats.diffusers_folder import find_weights, read_json
from ldm.formats.diffusers_names import vae_names
from ldm.formats.weights import read_file
from ldm.shipped import find

PREFIX = "first_stage_model."
_CONFIG = "config.json"
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def overflows_in_fp16(name: str | Path) -> bool | None:
    """Return what an autoencoder's own configuration says of fp16 (`force_upcast`); None: it has none, or does not say.

    Args:
        name: as of `read_vae`; a file's configuration lies beside it.

    Raises:
        UserError: the configuration cannot be read.
    """
    path = find(name)
    folder = path if path.is_dir() else path.parent
    file = folder / "vae" / _CONFIG if path.is_dir() and (folder / "vae").is_dir() else folder / _CONFIG
    content = read_json(file) if file.is_file() else {}
    said = content.get("force_upcast") if content.get("_class_name") == "AutoencoderKL" else None
    return said if isinstance(said, bool) else None


def read_vae(name: str | Path, config: AutoencoderConfig) -> dict[str, Tensor]:
    """Return an autoencoder's tensors under SD's names.

    Args:
        name: a .ckpt or .safetensors file, or diffusers' folder of it (or of a whole model).

    Raises:
        UserError: nothing there, a broken file, or no autoencoder in it.
    """
    path = find(name)
    files = [path]
    if path.is_dir():
        files = find_weights(path / "vae" if (path / "vae").is_dir() else path)
    state = {key: tensor for file in files for key, tensor in read_file(file)[0].items()}
    if own := {key: tensor for key, tensor in state.items() if key.startswith(PREFIX)}:
        return own
    parts = {key: tensor for key, tensor in state.items() if key.startswith(_PARTS)}
    if not parts:
        raise UserError(
            f"{name} holds no autoencoder: expected a VAE's .ckpt or .safetensors file, or diffusers' folder of it"
        )
    if any(key.startswith("encoder.down_blocks.") for key in parts):
        return vae_names(parts, config)
    return {PREFIX + key: tensor for key, tensor in parts.items()}
