"""The world's latents, encoded once."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.autoencoder import AutoencoderKL


@torch.inference_mode()
def encoded_world(autoencoder: AutoencoderKL, images: np.ndarray, file: Path, device: torch.device) -> Tensor:
    """Return the posterior moments (n, 2 c, h, w) fp16 of images (n, H, W, 3) uint8, cached in `file`.

    Means and log-variances are concatenated along the channels.
    """
    if file.is_file():
        return torch.load(file, weights_only=True)
    autoencoder = autoencoder.to(device).eval()
    chunks = []
    for start in tqdm(range(0, len(images), 100), "encoding"):
        x = torch.from_numpy(images[start : start + 100].copy()).to(device)
        posterior = autoencoder.encode(x.permute(0, 3, 1, 2).float() / 127.5 - 1)
        chunks.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu())
    moments = torch.cat(chunks)
    torch.save(moments, file)
    return moments


def encoder_digest(autoencoder: AutoencoderKL) -> str:
    """Return 8 hex digits that differ between encoders, so that latents of an earlier one are never taken.

    Weights are rounded to fp16, as they are on disk; the decoder does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in autoencoder.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:8]


def latent_scale(moments: Tensor) -> float:
    """Return the factor that gives the latents of `moments` unit variance (Rombach et al. 2022, App. G)."""
    mean, logvar = moments[:2000].float().chunk(2, dim=1)
    return float(1 / (mean.var() + logvar.exp().mean()).sqrt())
