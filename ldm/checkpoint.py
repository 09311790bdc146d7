"""Checkpoints: state dicts under SD's names in .safetensors files, loaded strictly."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import config as configuration
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

TOLERATED = ("model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "model.betas")
"""Prefixes of keys that SD checkpoints carry and that no network reads: the schedule and averaged weights."""

TOKEN_TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOKEN_ROWS, TOKEN_IDS = TOKEN_TABLE + ".rows", TOKEN_TABLE + ".ids"


def load_model(path: str | Path, checkpoint: str | Path | None = None) -> LatentDiffusion:
    """Build the model that a YAML file describes and load its weights, in fp32 on the CPU.

    Args:
        path: model configuration, such as configs/model/tiny.yaml.
        checkpoint: .safetensors file, or a folder of them, in place of the configuration's own.

    Raises:
        UserError: the configuration or the checkpoint is missing, or does not fit.
    """
    config = configuration.load(ModelConfig, path)
    if checkpoint is None and config.checkpoint is not None:
        checkpoint = configuration.project_root(path) / config.checkpoint
    if checkpoint is None:
        raise UserError(f"{path} names no checkpoint: give one with --checkpoint FILE")
    model = LatentDiffusion(config)
    load_weights(model, read_state_dict(checkpoint), source=str(checkpoint))
    return model.eval().requires_grad_(False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read one .safetensors file, or all those of a folder, into one state dict.

    Raises:
        UserError: nothing there, or a file is broken.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"no checkpoint at {path}: expected a .safetensors file or a folder of them")
    state = {}
    for file in files:
        state.update(read_safetensors(file)[0])
    return state


def read_safetensors(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a .safetensors file's tensors and metadata.

    Raises:
        UserError: the file is missing, or is not a whole .safetensors file.
    """
    if not Path(file).is_file():
        raise UserError(f"no file {file}: expected a .safetensors file")
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in list(content.keys())}, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole .safetensors file ({error}): fetch or make it anew") from error


def load_weights(model: LatentDiffusion, state: dict[str, Tensor], source: str) -> None:
    """Fill the model from a state dict under SD's names.

    Only schedule buffers, averaged weights and position ids may be there besides the model's own keys.

    Raises:
        UserError: a key is missing or unexpected, or a tensor has another shape; the first are named.
    """
    state = _unpack_token_table(state)
    expected = model.state_dict()
    extra = [k for k in state if k not in expected and not k.startswith(TOLERATED) and not k.endswith("position_ids")]
    missing = [k for k in expected if k not in state]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    for problem, keys in (("lacks", missing), ("has unknown", extra), ("does not fit:", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{source} {problem} {', '.join(keys[:3])}{more}: is it a checkpoint for '{model.config.name}'?")
    model.load_state_dict({k: state[k] for k in expected})


def save_weights(state: dict[str, Tensor], path: str | Path, **metadata: str) -> None:
    """Write tensors as fp16 .safetensors; integers stay integers."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, path, metadata or None)


def pack_token_table(rows: Tensor, ids: np.ndarray) -> dict[str, Tensor]:
    """Return the state-dict entries of a token table of which only some rows were trained.

    Args:
        rows: trained embeddings (n, d).
        ids: their token ids (n,).
    """
    return {TOKEN_ROWS: rows, TOKEN_IDS: torch.as_tensor(ids, dtype=torch.int32)}


def token_table(width: int, vocab_size: int) -> Tensor:
    """The untrained token table of the embedded model (vocab_size, width): N(0, 0.02), always the same.

    numpy's RandomState guarantees its numbers for ever, which torch does not.
    """
    table = np.random.RandomState(0).standard_normal((vocab_size, width))
    return torch.from_numpy(0.02 * table).float()


def _unpack_token_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rebuild a whole token table from its trained rows, where a checkpoint holds only those."""
    if TOKEN_ROWS not in state:
        return state
    state = dict(state)
    rows, ids = state.pop(TOKEN_ROWS), state.pop(TOKEN_IDS)
    table = token_table(rows.shape[1], configuration.TextEncoderConfig.vocab_size)
    table[ids.long()] = rows.float()
    return {**state, TOKEN_TABLE: table}


def fingerprint(model: LatentDiffusion) -> str:
    """Return 16 hex digits that tell base models apart.

    Hashes the weights that a concept builds on: the UNet's cross-attention keys and values and the
    text transformer's first layer, rounded to fp16 so that a checkpoint's precision does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name or ".encoder.layers.0." in name:
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]
