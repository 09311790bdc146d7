"""Training of the embedded model's autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.autoencoder import AutoencoderKL
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.loop import PretrainingModule


class VAEPretraining(PretrainingModule):
    """AutoencoderKL on pixels: reconstruction, coarse colours, and a light pull to N(0, 1)."""

    def __init__(self, autoencoder: AutoencoderKL, config: PretrainConfig):
        super().__init__(autoencoder, config)
        if config.decoder_only:
            for part in (autoencoder.encoder, autoencoder.quant_conv):
                part.requires_grad_(False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Batch: pictures (b, 3, h, w) uint8."""
        x = batch.float() / 127.5 - 1
        posterior = self.network.encode(x)
        decoded = self.network.decode(posterior.sample())
        with torch.autocast(x.device.type, enabled=False):
            loss = reconstruction_loss(decoded.float(), x)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        self.log_dict({"mse": F.mse_loss(decoded.float(), x), "kl": kl}, prog_bar=True)
        return loss + self.config.kl_weight * kl


def reconstruction_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error on pixels, and on 4 x 4 means, without which weak colours collapse first."""
    coarse, coarse_target = F.avg_pool2d(decoded, 4), F.avg_pool2d(target, 4)
    fine = F.l1_loss(decoded, target) + 3 * F.mse_loss(decoded, target)
    return fine + 1.5 * F.l1_loss(coarse, coarse_target) + 4 * F.mse_loss(coarse, coarse_target)
