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
from ldm.formats import compvis_config, hub, separate_vae, sgm_config
from ldm.formats.weights import Weights, are_weights, open_weights
from ldm.formats.weights import read_safetensors as read_safetensors
from ldm.formats.weights import read_state_dict as read_state_dict
from ldm.runtime import mapped_files
from ldm.shipped import find

TOLERATED = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "scale_factor"),
    *(f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale", "attn_mask")),
    *(f"conditioner.embedders.1.model.{name}" for name in ("logit_scale", "attn_mask")),
    "denoiser.sigmas",
}
"""Keys that SD checkpoints carry and that no network reads: the schedule, and what open_clip needs for images."""

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
    vae: str | Path | None = None,
) -> LatentDiffusion:
    """Build a Stable Diffusion model and load its weights, on the CPU.

    Args:
        path: our YAML file, one of CompVis or Stability AI, or weights whose architecture can be inferred: a .ckpt
            or .safetensors file, a diffusers folder, a hub id.
        checkpoint: weights in place of those that `path` names: as above, or a folder of .safetensors files.
        dtype: precision of the weights, or a function of the configuration that returns it; None keeps the file's own.
            In the file's precision the weights are memory-mapped and not copied.
        ema: use the averaged weights (`model_ema.*`) of a training checkpoint for the UNet.
        clip_skip: layers of the text encoder to stop before the end, counted from 1 (none left out).
        vae: file or folder of an autoencoder that takes the place of the weights' own; None: what a YAML file of
            ours names as `vae:`, if anything. Its own configuration, or else the model's, says
            whether it may compute in fp16.

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
        root = configuration.project_root(path)
        if checkpoint is None and config.checkpoint is not None:
            checkpoint = hub.anchored(config.checkpoint, root)
        if vae is None and config.vae is not None:
            vae = find(config.vae, root)
    if checkpoint is not None:
        weights = open_weights(checkpoint, half)
    if weights is None:
        raise UserError(f"{path} names no checkpoint: give one as checkpoint=")
    if clip_skip is not None:
        config = _with_clip_skip(config, clip_skip)
    if vae is not None:
        config, weights = _with_vae(config, weights, vae)
    return _fill(config, weights, dtype(config) if callable(dtype) else dtype, ema)


def model_config(path: str | Path) -> ModelConfig:
    """Return the configuration of what `load_model` takes as its path, without loading the weights.

    Raises:
        UserError: it is missing or broken, or its architecture cannot be inferred.
    """
    return open_weights(path).config() if are_weights(path) else read_config(path)


def _with_vae(config: ModelConfig, weights: Weights, vae: str | Path) -> tuple[ModelConfig, Weights]:
    """Put another autoencoder in the place of the weights' own, and what it says of fp16 in the place of the model's."""
    kept = {name: tensor for name, tensor in weights.state.items() if not name.startswith(separate_vae.PREFIX)}
    state = kept | separate_vae.read_vae(vae, config.autoencoder)
    upcast = separate_vae.overflows_in_fp16(vae)
    own = config.autoencoder if upcast is None else dataclasses.replace(config.autoencoder, force_upcast=upcast)
    weights = dataclasses.replace(weights, state=state, source=f"{weights.source} with {vae}")
    return dataclasses.replace(config, autoencoder=own), weights


def _with_clip_skip(config: ModelConfig, clip_skip: int) -> ModelConfig:
    """Stop both text encoders earlier, where there are two."""
    first, second = config.text_encoder, config.text_encoder_2
    return dataclasses.replace(
        config,
        text_encoder=dataclasses.replace(first, clip_skip=clip_skip),
        text_encoder_2=None if second is None else dataclasses.replace(second, clip_skip=clip_skip),
    )


_MODELS = "a YAML file, a .ckpt or .safetensors file, a diffusers folder, or a hub id owner/name"


def read_config(path: str | Path) -> ModelConfig:
    """Read a model's YAML file, ours or an official one (`model: target/params`).

    Raises:
        UserError: no such file, or it holds something unknown.
    """
    path = find(path)
    if not path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"no model at {path}: expected {_MODELS}")
    try:
        content = configuration.read_yaml(path)
    except UserError as error:
        if path.suffix.lower() in (".yaml", ".yml"):
            raise
        raise UserError(f"{path} is no model: expected {_MODELS}") from error
    if compvis_config.is_compvis_config(content):
        convert = sgm_config.convert if sgm_config.is_sgm_config(content) else compvis_config.convert
        # The merge checks the values' types.
        return configuration.build(ModelConfig, dataclasses.asdict(convert(content, path)), source=str(path))
    return configuration.build(ModelConfig, content, source=str(path))


def _fill(config: ModelConfig, weights: Weights, dtype: torch.dtype | None, ema: bool) -> LatentDiffusion:
    """Build a model without memory and put the weights into it."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    load_weights(model, weights.state, weights.source, dtype, ema, mapped_files.releaser())
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
    On the meta device a model takes the tensors themselves, in `dtype` or, with None, as they are; elsewhere it copies.

    Args:
        release: called with each tensor once it was looked at, see `ldm.runtime.mapped_files`.

    Raises:
        UserError: a key is missing or unexpected, or a tensor has another shape, an unknown precision or
            values that are no numbers; the first are named.
    """
    state = _unpack_token_table(state, source)
    if model.config.text_encoder_2 is None and any(name.startswith("conditioner.") for name in state):
        raise UserError(
            f"{source} holds Stable Diffusion XL, not '{model.config.name}': give it by itself, or with "
            "configs/model/sdxl.yaml"
        )
    expected = model.state_dict()
    trained = any(name.startswith("model.diffusion_model.") for name in state)
    if ema or (not trained and any(name.startswith(EMA + "diffusion_model") for name in state)):
        state = _averaged(state, expected, source)
    _check_keys(model.config, state, expected, source)
    assign = any(tensor.is_meta for tensor in expected.values())
    if assign and dtype == torch.bfloat16:
        model.loaded_fingerprint = fingerprint_of({k: state[k] for k in expected})
    ready, broken = {}, []
    for k in expected:
        if not _finite(state[k]):
            broken.append(k)
        ready[k] = state[k].to(_precision(model.config, k, dtype or state[k].dtype)).contiguous() if assign else state[k]
        release(state[k])
    _refuse(source, "holds NaN or infinite values in", broken, "the file is damaged, or was saved after training failed")
    model.load_state_dict(ready, assign=assign)


def _check_keys(config: ModelConfig, state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Raise UserError for keys that are missing or unexpected, other shapes, and precisions that cannot be computed with."""
    missing = [k for k in expected if k not in state]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    precision = [f"{k} is {_kind(state[k])}" for k in expected if k in state and not _plain(state[k])]
    # SD 2.x reads the layer before the last, which its checkpoints hold all the same.
    spare, first = f"{_LAYERS}{config.text_encoder.layers}.", f"{_LAYERS}0."
    extra = [k for k in state if not _tolerated(k) and k.replace(spare, first) not in expected]
    fit = f"is it a checkpoint for '{config.name}'?"
    if missing and all(k.startswith(separate_vae.PREFIX) for k in missing):
        fit = "it has no autoencoder: give one as vae="
    computable = "expected fp16, bf16 or fp32: fetch the model in one of these"
    for problem, keys, advice in (
        ("lacks", missing, fit),
        ("has unknown", extra, fit),
        ("does not fit:", wrong, fit),
        ("cannot be computed with:", precision, computable),
    ):
        _refuse(source, problem, keys, advice)


def _precision(config: ModelConfig, name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision that a weight is kept in: as asked for, but no fp16 for an autoencoder that overflows in it."""
    overflows = config.autoencoder.force_upcast and name.startswith("first_stage_model.") and dtype == torch.float16
    return torch.float32 if overflows else dtype


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
        raise UserError(f"{source} has no averaged weights {lacking[0]}: load it without ema=")
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
    rows, ids, size = state.pop(TOKEN_ROWS), state.pop(TOKEN_IDS, torch.empty(0)), configuration.TextEncoderConfig.vocab_size
    numbers = ids.dtype == torch.int32 and ids.shape == rows.shape[:1] and ids.numel()
    if rows.ndim != 2 or not _plain(rows) or not numbers or ids.min() < 0 or ids.max() >= size:
        _refuse(
            source,
            "cannot be used:",
            [TOKEN_ROWS],
            f"expected a row (n, d) for each of the n token ids below {size} in {TOKEN_IDS}",
        )
    table = token_table(rows.shape[1], size)
    table[ids.long()] = rows.float()
    return {**state, TOKEN_TABLE: table}


def fingerprint(model: LatentDiffusion) -> str:
    """Return 16 hex digits that differ between base models.

    Hashes the weights that a concept builds on: the UNet's cross-attention keys and values and the
    text transformer's first layer, rounded to fp16 so that a checkpoint's precision does not matter, nor
    its format.
    """
    # bf16 keeps too little of an fp16 or fp32 file to tell from.
    return model.loaded_fingerprint or fingerprint_of(model.state_dict())


def surroundings_digest(model: LatentDiffusion) -> str:
    """Return 16 hex digits of what training sees besides `fingerprint`: a model's configuration and autoencoder.

    Rounded to fp16, like that; names, places and samplers' defaults do not matter.
    """
    config = dataclasses.asdict(dataclasses.replace(model.config, name="", checkpoint=None, sampling={}))
    del config["vae"]  # its weights count, not its name
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in model.autoencoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """Return the fingerprint of a state dict under SD's names, in the order that our model has them."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if is_fingerprinted(name):
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_fingerprinted(name: str) -> bool:
    """Whether the fingerprint depends on a tensor."""
    return any(part in name for part in (".attn2.to_k.", ".attn2.to_v.", ".encoder.layers.0.", ".resblocks.0."))
