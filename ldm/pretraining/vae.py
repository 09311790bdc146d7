"""Training of the embedded model's autoencoder."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.autoencoder import AutoencoderKL
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.loop import PretrainingModule


class VAEPretraining(PretrainingModule[AutoencoderKL]):
    """AutoencoderKL on pixels: reconstruction, coarse colours, and a light pull to N(0, 1)."""

    def __init__(self, autoencoder: AutoencoderKL, config: PretrainConfig):
        super().__init__(autoencoder, config)
        if config.decoder_only:
            for part in (autoencoder.encoder, autoencoder.quant_conv):
                part.requires_grad_(False)
        compiled = partial(torch.compile, dynamic=False, disable=not config.compile)
        self._encode, self._decode = compiled(autoencoder.encode), compiled(autoencoder.decode)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Batch: images (b, 3, h, w) uint8."""
        x = batch.float() / 127.5 - 1
        posterior = self._encode(x)
        decoded = self._decode(posterior.sample())
        with torch.autocast(x.device.type, enabled=False):
            loss = reconstruction_loss(decoded.float(), x)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        self.log_dict({"mse": F.mse_loss(decoded.float(), x), "kl": kl}, prog_bar=True)
        return loss + self.config.kl_weight * kl


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error on pixels, and on 4 x 4 means, without which weak colours collapse first.

    The squared error has most of the weight: it is what PSNR measures.
    """
    coarse, coarse_target = F.avg_pool2d(decoded, 4), F.avg_pool2d(target, 4)
    return 0.2 * F.l1_loss(decoded, target) + 4 * F.mse_loss(decoded, target) + 2 * F.mse_loss(coarse, coarse_target)


@torch.inference_mode()
def psnr(autoencoder: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Peak signal-to-noise ratio of each reconstruction of images (n, h, w, 3) uint8, in dB: (n,)."""
    values = []
    for start in range(0, len(images), 100):
        x = torch.from_numpy(images[start : start + 100].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = autoencoder.decode(autoencoder.encode(x).mean).clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - x).square().mean(dim=(1, 2, 3))))
    return torch.cat(values)
