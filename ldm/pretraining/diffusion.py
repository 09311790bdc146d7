"""Training of the embedded model's UNet and text transformer, together, as in latent diffusion."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm import tokenizer
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.loop import PretrainingModule
from ldm.schedule import q_sample, training_target
from ldm.text_encoder import CLIPTextEncoder


class CaptionTable:
    """Token ids of captions, renumbered to the few tokens that the world's captions use."""

    def __init__(self, captions: list[str]):
        unique = sorted(set(captions) | {""})
        ids = np.array([tokenizer.frame(tokenizer.tokenize(text)) for text in unique])
        self.token_ids, compact = np.unique(ids, return_inverse=True)  # the tokens in use
        self.rows = torch.from_numpy(compact.reshape(ids.shape))  # (unique captions, 77)
        number = {text: i for i, text in enumerate(unique)}
        self.of_image = torch.tensor([number[text] for text in captions])
        self.empty = number[""]
        self.longest = max(len(tokenizer.tokenize(text)) for text in unique) + 2  # with start and end


@dataclass(frozen=True)
class LatentBatch:
    """Posterior moments of unscaled latents (b, 2 c, h, w) and compact caption ids (b, 77)."""

    moments: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> "LatentBatch":
        """Return a copy of the batch on a device."""
        return LatentBatch(self.moments.to(device), self.ids.to(device))


class TextToImage(nn.Module):
    """UNet, text transformer, and a compact token table, so that only tokens in use are trained."""

    def __init__(self, model: LatentDiffusion, token_ids: np.ndarray):
        super().__init__()
        self.unet = model.unet
        if not isinstance(model.text_encoder, CLIPTextEncoder):
            raise UserError(f"the model '{model.config.name}' has no CLIP text encoder, the only kind that is pretrained")
        self.text = model.text_encoder
        self.rows = nn.Parameter(self.text.token_table[torch.from_numpy(token_ids)].clone())
        # The full table is not needed from here on: keep it out of checkpoints and averages.
        self.text.transformer.text_model.embeddings.token_embedding = nn.Embedding(1, self.rows.shape[1])
        self.text.token_table.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text.encode(F.embedding(ids, self.rows)))


class DiffusionPretraining(PretrainingModule[TextToImage]):
    """Denoising loss with min-SNR weights (Hang et al. 2023), kept from vanishing where SNR is large."""

    alphas_cumprod: Tensor

    def __init__(self, network: TextToImage, captions: CaptionTable, model: LatentDiffusion, config: PretrainConfig):
        super().__init__(network, config)
        self.captions = captions
        self.scale = model.config.latent_scale
        self.parameterization = model.config.schedule.parameterization
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.clone(), persistent=False)
        if config.compile:
            network.compile(dynamic=False)  # two lengths of context, two graphs

    def training_step(self, batch: LatentBatch, index: int) -> Tensor:
        mean, logvar = batch.moments.float().chunk(2, dim=1)
        x_0 = self.scale * (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        noise = torch.randn_like(x_0)
        t = torch.randint(len(self.alphas_cumprod), x_0.shape[:1], device=self.device)
        alpha = self.alphas_cumprod[t]

        # Padding beyond the captions matters only when sampling: learn it last, it costs time.
        early = self.global_step < self.config.full_context_from * self.config.steps
        ids = batch.ids[:, : self.captions.longest] if early else batch.ids
        dropped = torch.rand(len(ids), device=self.device) < self.config.caption_dropout
        ids = torch.where(dropped[:, None], self.captions.rows[self.captions.empty, : ids.shape[1]].to(ids), ids)

        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else sdpa_kernel(list(GPU_KERNELS)):
            output = self.network(q_sample(x_0, noise, alpha), t, ids).float()
        target = training_target(x_0, noise, alpha, self.parameterization)
        error = (output - target).square().mean(dim=(1, 2, 3))
        self.log_dict({"mse": error.mean(), "mse_early": error[t >= 750].mean()}, prog_bar=True)
        return (error * self._weight(alpha)).mean()

    def _weight(self, alpha: Tensor) -> Tensor:
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / snr + 0.15
        # The v-loss is the eps-loss times (snr + 1): the same weights on the same footing.
        return weight if self.parameterization == "eps" else weight * snr / (snr + 1)


GPU_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class LatentDataset(torch.utils.data.Dataset):
    """Cached posterior moments with their captions' compact ids; fetched a whole batch at once."""

    def __init__(self, moments: Tensor, captions: CaptionTable):
        self.moments, self.captions = moments, captions

    def __len__(self) -> int:
        return len(self.moments)

    def __getitems__(self, indices: list[int]) -> LatentBatch:
        index = torch.tensor(indices)
        return LatentBatch(self.moments[index], self.captions.rows[self.captions.of_image[index]])

    @staticmethod
    def collate(batch: LatentBatch) -> LatentBatch:
        """A fetched batch is whole already."""
        return batch
