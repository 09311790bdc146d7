"""Checkpoints: the weights of any format, loaded strictly and without a second copy in memory."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import config as configuration
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats import compvis_config, hub, mapped
from ldm.formats.weights import Weights, are_weights, open_weights
from ldm.formats.weights import read_safetensors as read_safetensors
from ldm.formats.weights import read_state_dict as read_state_dict

TOLERATED = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "scale_factor"),
    *(f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale", "attn_mask")),
}
"""Keys that SD checkpoints carry and that no network reads: the schedule, and what open_clip needs for pictures."""

EMA = "model_ema."
_LAYERS = "cond_stage_model.model.transformer.resblocks."
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TOKEN_TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOKEN_ROWS, TOKEN_IDS = TOKEN_TABLE + ".rows", TOKEN_TABLE + ".ids"


def load_model(
    path: str | Path,
    checkpoint: str | Path | None = None,
    *,
    dtype: torch.dtype | Callable[[ModelConfig], torch.dtype] | None = torch.float32,
    ema: bool = False,
    clip_skip: int | None = None,
) -> LatentDiffusion:
    """Build a Stable Diffusion model and load its weights, on the CPU.

    Args:
        path: our YAML file, one of CompVis or Stability AI, or weights that tell their architecture: a .ckpt
            or .safetensors file, a diffusers folder, a hub id.
        checkpoint: weights in place of those that `path` names: as above, or a folder of .safetensors files.
        dtype: precision of the weights, or what tells it from the configuration; None keeps the file's own.
            In the file's precision the weights are memory-mapped and not copied.
        ema: use the averaged weights (`model_ema.*`) of a training checkpoint for the UNet.
        clip_skip: layers of the text encoder to stop before the end, counted from 1 (none left out).

    Raises:
        UserError: the configuration or the weights are missing, broken, hostile, or do not fit.
    """
    half = dtype == torch.float16
    weights = None
    if are_weights(path):
        weights = open_weights(path, half)
        config = weights.config()
    else:
        config = read_config(path)
        if checkpoint is None and config.checkpoint is not None:
            checkpoint = hub.anchored(config.checkpoint, configuration.project_root(path))
    if checkpoint is not None:
        weights = open_weights(checkpoint, half)
    if weights is None:
        raise UserError(f"{path} names no checkpoint: give one with --checkpoint FILE")
    if clip_skip is not None:
        config = dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, clip_skip=clip_skip))
    return _fill(config, weights, dtype(config) if callable(dtype) else dtype, ema)


def read_config(path: str | Path) -> ModelConfig:
    """Read a model's YAML file, ours or an official one (`model: target/params`).

    Raises:
        UserError: no such file, or it holds something unknown.
    """
    path = Path(path)
    if not path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(
            f"no model at {path}: expected a YAML file, a .ckpt or .safetensors file, a diffusers folder, or a hub id "
            "owner/name"
        )
    content = configuration.read_yaml(path)
    if compvis_config.is_compvis_config(content):
        # The merge checks the values' types.
        return configuration.build(ModelConfig, dataclasses.asdict(compvis_config.convert(content, path)), source=str(path))
    return configuration.build(ModelConfig, content, source=str(path))


def _fill(config: ModelConfig, weights: Weights, dtype: torch.dtype | None, ema: bool) -> LatentDiffusion:
    """Build a model without memory and put the weights into it."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    load_weights(model, weights.state, weights.source, dtype, ema, mapped.releaser())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            # transformers counts the positions in a buffer that no checkpoint needs to hold.
            owner, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            setattr(model.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
    return model.eval().requires_grad_(False)


def load_weights(
    model: LatentDiffusion,
    state: dict[str, Tensor],
    source: str,
    dtype: torch.dtype | None = torch.float32,
    ema: bool = False,
    release: Callable[[Tensor], None] = lambda tensor: None,
) -> None:
    """Fill the model from a state dict under SD's names.

    Besides the model's own keys, only those may be there that published checkpoints carry and nothing reads.
    A model on the meta device takes the tensors themselves, in `dtype` or, with None, as they are; in
    any other the values are copied.

    Args:
        release: called with each tensor once it was looked at, see `ldm.formats.mapped`.

    Raises:
        UserError: a key is missing or unexpected, or a tensor has another shape, an unknown precision or
            values that are no numbers; the first are named.
    """
    state = _unpack_token_table(state, source)
    expected = model.state_dict()
    if ema:
        state = _averaged(state, expected, source)
    missing = [k for k in expected if k not in state]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    precision = [f"{k} is {_kind(state[k])}" for k in expected if k in state and not _plain(state[k])]
    # SD 2.x reads the layer before the last, which its checkpoints hold all the same.
    spare, first = f"{_LAYERS}{model.config.text_encoder.layers}.", f"{_LAYERS}0."
    extra = [k for k in state if not _tolerated(k) and k.replace(spare, first) not in expected]
    fit = f"is it a checkpoint for '{model.config.name}'?"
    computable = "expected fp16, bf16 or fp32: fetch the model in one of these"
    for problem, keys, advice in (
        ("lacks", missing, fit),
        ("has unknown", extra, fit),
        ("does not fit:", wrong, fit),
        ("cannot be computed with:", precision, computable),
    ):
        _refuse(source, problem, keys, advice)
    assign = any(tensor.is_meta for tensor in expected.values())
    if assign and dtype == torch.bfloat16:
        model.loaded_fingerprint = _digest({k: state[k] for k in expected})
    ready, broken = {}, []
    for k in expected:
        if not _finite(state[k]):
            broken.append(k)
        ready[k] = state[k].to(dtype or state[k].dtype).contiguous() if assign else state[k]
        release(state[k])
    _refuse(source, "holds NaN or infinite values in", broken, "the file is damaged, or was saved after training failed")
    model.load_state_dict(ready, assign=assign)


def _refuse(source: str, problem: str, keys: list[str], advice: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise UserError(f"{source} {problem} {', '.join(keys[:3])}{more}: {advice}")


def _tolerated(key: str) -> bool:
    return key in TOLERATED or key.startswith(EMA) or key.endswith(".embeddings.position_ids")


def _averaged(state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Put the UNet's averaged weights in place of its last ones; their names are the UNet's without the dots."""
    names = {k: EMA + k.removeprefix("model.").replace(".", "") for k in expected if k.startswith("model.")}
    lacking = [name for name in names.values() if name not in state]
    if lacking:
        raise UserError(f"{source} has no averaged weights {lacking[0]}: load it without --ema")
    return {**state, **{k: state[name] for k, name in names.items()}}


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype in PRECISIONS and tensor.layout == torch.strided and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return kind if tensor.layout == torch.strided and not tensor.is_meta else f"{kind} without its values"


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; without a temporary of the tensor's size."""
    return all(torch.isfinite(end) for end in torch.aminmax(tensor))


def save_weights(state: dict[str, Tensor], path: str | Path, **metadata: str) -> None:
    """Write tensors as fp16 .safetensors; integers stay integers."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    # Written beside and renamed: a model may be reading the old file through its memory map.
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, beside, metadata or None)
    os.replace(beside, path)


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


def _unpack_token_table(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rebuild a whole token table from its trained rows, where a checkpoint holds only those."""
    if TOKEN_ROWS not in state:
        return state
    state = dict(state)
    rows, ids, size = state.pop(TOKEN_ROWS), state.pop(TOKEN_IDS, None), configuration.TextEncoderConfig.vocab_size
    numbers = ids is not None and ids.dtype == torch.int32 and ids.shape == rows.shape[:1] and ids.numel()
    if rows.ndim != 2 or not _plain(rows) or not numbers or ids.min() < 0 or ids.max() >= size:
        _refuse(source, "cannot be used:", [TOKEN_ROWS],
                f"expected a row (n, d) for each of the n token ids below {size} in {TOKEN_IDS}")  # fmt: skip
    table = token_table(rows.shape[1], size)
    table[ids.long()] = rows.float()
    return {**state, TOKEN_TABLE: table}


def fingerprint(model: LatentDiffusion) -> str:
    """Return 16 hex digits that tell base models apart.

    Hashes the weights that a concept builds on: the UNet's cross-attention keys and values and the
    text transformer's first layer, rounded to fp16 so that a checkpoint's precision does not matter, nor
    its format.
    """
    # bf16 keeps too little of an fp16 or fp32 file to tell from.
    return model.loaded_fingerprint or _digest(model.state_dict())


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if any(part in name for part in (".attn2.to_k.", ".attn2.to_v.", ".encoder.layers.0.", ".resblocks.0.")):
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]
