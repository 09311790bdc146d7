"""ICO fine-tuning (Sec. 3.2): the loss, what is trained, and its rates."""

import dataclasses

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dci.concept import Concept
from dci.config import FinetuneConfig
from dci.context import LearnedTokens, initial_contexts
from dci.data import REGULARIZATION, ConceptBatch
from dci.tokens import initial_embeddings, modifier_names
from ldm import attention, checkpoint
from ldm.diffusion import LatentDiffusion
from ldm.schedule import q_sample, training_target


def attend_first_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention through which no gradient reaches the start token's key and value."""
    k, v = (torch.cat([y[:, :, :1].detach(), y[:, :, 1:]], dim=2) for y in (k, v))
    return attention.attend(q, k, v)


def cross_attention_keys_values(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """Return the weights of every cross-attention to_k and to_v, under SD's names."""
    return {n: p for n, p in model.named_parameters() if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))}


class ICOTraining(pl.LightningModule):
    """Diffusion loss on pictures whose prompts are learned contexts around `V* noun`."""

    def __init__(self, model: LatentDiffusion, config: FinetuneConfig, pictures: int):
        """Prepare the base model for fine-tuning on a number of reference pictures.

        Raises:
            UserError: not 1 to 3 modifier tokens, or a word to start from that is not one token.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.base = checkpoint.fingerprint(model)
        words = config.concept.initial_words
        self.modifier_tokens = modifier_names(len(words))
        generator = torch.Generator().manual_seed(config.training.seed)
        contexts = initial_contexts(config.context, pictures, model.text_encoder, generator)
        modifiers = initial_embeddings(words, model.text_encoder.token_table)
        self.learned = LearnedTokens(modifiers, *contexts, config.concept.class_noun)
        model.requires_grad_(False)
        self.keys_values = cross_attention_keys_values(model)
        for parameter in self.keys_values.values():
            parameter.requires_grad_(True)

    def training_step(self, batch: ConceptBatch, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss(self, batch: ConceptBatch) -> Tensor:
        """Mean squared error of the predicted noise (or v) on randomly mirrored, randomly noised latents."""
        model = self.model
        b = len(batch.pictures)
        mirrored = torch.randint(2, (b,), device=self.device) * self.config.data.flip
        mean, logvar = batch.moments[torch.arange(b, device=self.device), mirrored].chunk(2, dim=1)
        x_0 = model.config.latent_scale * (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        noise = torch.randn_like(x_0)
        t = torch.randint(len(model.alphas_cumprod), (b,), device=self.device)
        alpha = model.alphas_cumprod[t]
        output = model.predict(q_sample(x_0, noise, alpha), t, self.contexts(batch), attend_first_detached)
        return F.mse_loss(output.float(), training_target(x_0, noise, alpha, model.config.schedule.parameterization))

    def contexts(self, batch: ConceptBatch) -> Tensor:
        """Text contexts (b, 77, d): learned prompts for references, captions for regularization."""
        text = self.model.text_encoder
        references = [i for i, picture in enumerate(batch.pictures) if picture != REGULARIZATION]
        learned_ids, extra = self.learned.training_prompts([batch.pictures[i] for i in references])
        ids = batch.caption_ids.clone()
        ids[references] = learned_ids
        return text.encode(text.embed(ids, extra))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        training = self.config.training
        groups = [
            {"params": [*self.keys_values.values()], "lr": training.learning_rate},
            {"params": [self.learned.modifiers], "lr": training.modifier_learning_rate or training.learning_rate},
            {"params": self.learned.context_parameters(), "lr": training.context_learning_rate},
        ]
        return torch.optim.AdamW(groups, weight_decay=training.weight_decay)

    def concept(self) -> Concept:
        """Return what has been learned so far; keys and values rounded to fp16."""
        return Concept(
            keys_values={name: weight.detach().half().cpu() for name, weight in self.keys_values.items()},
            modifiers=self.learned.modifiers.detach().cpu().clone(),
            prefixes=torch.stack([row.detach().cpu() for row in self.learned.prefixes]),
            suffixes=torch.stack([row.detach().cpu() for row in self.learned.suffixes]),
            modifier_tokens=self.modifier_tokens,
            class_noun=self.config.concept.class_noun,
            base=self.base,
            base_name=self.model.config.name,
            config=dataclasses.asdict(self.config),
        )
