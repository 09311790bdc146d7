"""Fine-tuning by ICO (Sec. 3.2) and its relatives: the loss, what is trained, and its rates."""

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dci.concept.concept_file import Concept, LowRank
from dci.concept.modifier_tokens import ConceptName, initial_embeddings, modifier_names
from dci.finetuning.config import FinetuneConfig, concepts_of
from dci.finetuning.dataset import REGULARIZATION, ConceptBatch
from dci.finetuning.gradients import GradientSum, sum_over_processes
from dci.finetuning.learned_prompts import LearnedTokens, initial_contexts
from dci.finetuning.low_rank_training import LowRankChanges
from dci.finetuning.masks import masked_mse
from dci.finetuning.precision import cast_frozen_weights
from ldm import attention, checkpoint
from ldm.autoencoder import Posterior
from ldm.conditioning import Conditioning, concatenated
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.noise import fitting_seed
from ldm.runtime.cpu_convolutions import to_mkldnn
from ldm.schedule import q_sample, training_target

GRADIENT_SUMS = {"fp64": torch.float64, "fp32": torch.float32}
TRAINABLE = ("crossattn-kv", "crossattn", "none")


def attend_first_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention through which no gradient reaches the start token's key and value.

    Args:
        q, k, v: (b, heads, positions, d); the start token is the first position of k and v.
    """
    k, v = (torch.cat([y[:, :, :1].detach(), y[:, :, 1:]], dim=2) for y in (k, v))
    return attention.attend(q, k, v)


def cross_attention_keys_values(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """Return the weights of every cross-attention to_k and to_v, under SD's names."""
    return {n: p for n, p in model.named_parameters() if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))}


def trainable_weights(model: LatentDiffusion, which: str) -> dict[str, nn.Parameter]:
    """Return the UNet's weights of a trainable set: crossattn-kv, crossattn (queries and outputs too), or none.

    Raises:
        UserError: there is no such set.
    """
    if which not in TRAINABLE:
        raise UserError(f"training.trainable={which}: expected one of {', '.join(TRAINABLE)}")
    if which == "crossattn-kv":
        return cross_attention_keys_values(model)
    return {n: p for n, p in model.named_parameters() if ".attn2." in n} if which == "crossattn" else {}


def references_per_step(config: FinetuneConfig) -> int:
    """Reference images of a step: half of the batch where there are regularization images."""
    size = config.training.batch_size
    return size - size // 2 if any(subject.regularization for subject in concepts_of(config)) else size


class ICOTraining(pl.LightningModule):
    """Diffusion loss on images whose prompts are learned contexts, or a template, around `V* noun`."""

    def __init__(self, model: LatentDiffusion, config: FinetuneConfig, images: int | list[int]):
        """Prepare the base model for fine-tuning.

        Args:
            images: number of reference images, of each concept where there are several.

        Raises:
            UserError: not 1 to 3 modifier tokens, or a word to start from that is not one token.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.base = checkpoint.fingerprint(model)
        self.model_digest = checkpoint.surroundings_digest(model)
        self.first_step = 0  # steps made before this process took the run up
        self.step_loss = 0.0  # of the last step, over all processes
        self.automatic_optimization = False
        self.learned = _learned_tokens(model, config, [images] if isinstance(images, int) else images)
        self.reached = torch.zeros(len(self.learned.modifiers), dtype=torch.bool)  # modifier tokens that had a gradient
        names = modifier_names([len(subject.initial_words) for subject in concepts_of(config)])
        self.names = tuple(ConceptName(n, s.class_noun) for n, s in zip(names, concepts_of(config), strict=True))
        model.requires_grad_(False)
        self.keys_values = trainable_weights(model, config.training.trainable)
        self.low_rank = _low_rank(self.keys_values, config)
        if self.low_rank is not None:
            self.keys_values = {}
        for parameter in self.keys_values.values():
            parameter.requires_grad_(True)
        self.predict = model.predict

    def prepare(self) -> None:
        """Arrange the networks for speed and memory; the images are encoded before."""
        training, model = self.config.training, self.model
        cast_frozen_weights(model, training.precision)
        model.unet.checkpointing = training.gradient_checkpointing
        if training.channels_last:
            model.unet.to(memory_format=torch.channels_last)
        if training.compile:
            self.predict = torch.compile(model.predict, dynamic=False)  # only here: validation would compile for each prompt
        elif model.device.type == "cpu":
            to_mkldnn(model.unet)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.first_step + self.trainer.global_step

    def training_step(self, parts: list[ConceptBatch], index: int) -> None:
        """Make one optimizer step on this process's share of a batch, a micro-batch at a time.

        Raises:
            UserError: the loss is not finite; the weights are still those before the step.
        """
        # Not in __init__: to another device a module may move its parameters or replace them.
        gradients = GradientSum([*self.trained().values()], GRADIENT_SUMS[self.config.training.gradient_sum])
        optimizer, total = self.optimizers(), 0.0
        assert not isinstance(optimizer, list)  # `configure_optimizers` makes one
        for part in parts:
            loss = part.share * self.loss(part)
            if loss.requires_grad:  # regularization images alone reach nothing in a frozen UNet
                self.manual_backward(loss)
            gradients.accumulate()
            total += loss.item()
        number = round(sum(part.share for part in parts)) * self.trainer.world_size  # of micro-batches
        # Every process sees the loss of all, so all stop together, before the optimizer has used it.
        self.step_loss = sum_over_processes(total, self.device) / number
        if not math.isfinite(self.step_loss):
            raise UserError(f"the loss is {self.step_loss} at step {self.steps_done + 1}")
        gradients.write_mean(number)
        if self.learned.modifiers.grad is not None:
            self.reached |= (self.learned.modifiers.grad != 0).any(dim=1).cpu()
        optimizer.step()
        optimizer.zero_grad()

    def loss(self, batch: ConceptBatch) -> Tensor:
        """Return the weighted mean squared error of the predicted noise (or v), a scalar."""
        model, schedule = self.model, self.model.config.schedule
        x_0 = self.latents(batch)
        alpha = model.alphas_cumprod[batch.t]
        x_t = q_sample(x_0, batch.noise, alpha)
        if self.config.training.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        text = self.conditioning(batch)
        if self.low_rank is not None:
            text = Conditioning(self.low_rank.keys_values(model, text.tensor), text.vector)
        output = self.predict(x_t, batch.t, text, attend_first_detached)
        target = training_target(x_0, batch.noise, alpha, schedule.parameterization)
        return masked_mse(output.float(), target, batch.weights)

    @torch.no_grad()
    def latents(self, batch: ConceptBatch) -> Tensor:
        """Scaled latents (b, c, h, w), sampled from the posteriors."""
        moments = batch.moments
        if len(batch.pixels):
            posterior = self.model.posterior(batch.pixels)
            moments = torch.cat([torch.cat([posterior.mean, posterior.logvar], dim=1).float(), moments])
        return self.model.config.latent_scale * Posterior(*moments.chunk(2, dim=1)).sample(batch.posterior_noise)

    def conditioning(self, batch: ConceptBatch) -> Conditioning:
        """What the UNet reads: learned prompts for references, captions for regularization.

        A caption is encoded once in a run.
        """
        text = self.model.text_encoder
        references = [i for i, image in enumerate(batch.images) if image != REGULARIZATION]
        others = [i for i, image in enumerate(batch.images) if image == REGULARIZATION]

        def sizes(rows: list[int]) -> Tensor | None:
            return None if batch.sizes is None else batch.sizes[rows]

        parts = []
        if references:
            images, words = [batch.images[i] for i in references], [batch.caption_prefix[i] for i in references]
            parts.append(text.condition(*self.learned.training_prompts(images, words), sizes(references)))
        if others:
            parts.append(text.conditions(batch.caption_ids[others].tolist(), None, sizes(others)))
        order = torch.tensor([*references, *others], device=parts[0].tensor.device).argsort()
        return concatenated(parts).rows(order)

    def contexts(self, batch: ConceptBatch) -> Tensor:
        """The text contexts (b, 77, d) of `conditioning`."""
        return self.conditioning(batch).tensor

    def configure_optimizers(self) -> torch.optim.Optimizer:
        training = self.config.training
        factor = references_per_step(self.config) if training.scale_lr else 1
        rates = (
            ([*self.keys_values.values()], training.learning_rate),
            ([] if self.low_rank is None else [*self.low_rank.parameters()], training.learning_rate),
            ([self.learned.modifiers], training.modifier_learning_rate or training.learning_rate),
            (self.learned.context_parameters(), training.context_learning_rate),
        )
        groups = [{"params": params, "lr": factor * rate} for params, rate in rates if params]
        return torch.optim.AdamW(groups, weight_decay=training.weight_decay)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return everything that is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def check_trained(self) -> None:
        """Raise UserError unless every modifier token has had a gradient; weight decay moves them all."""
        names = [token for name in self.names for token in name.modifier_tokens]
        still = [name for name, reached in zip(names, self.reached.tolist(), strict=True) if not reached]
        if still:
            raise UserError(f"training has not reached {', '.join(still)}: give more steps, or a larger training.batch_size")

    def merged(self) -> AbstractContextManager:
        """Within it the model has what was learned in its weights, as it has after a run."""
        return nullcontext() if self.low_rank is None else self.low_rank.merged(self.model)

    def _low_rank_changes(self) -> dict[str, LowRank]:
        factors = {} if self.low_rank is None else self.low_rank.factors()
        return {name: LowRank(*(factor.detach().half().cpu() for factor in change)) for name, change in factors.items()}

    def concept(self) -> Concept:
        """Return what has been learned so far; keys and values rounded to fp16, and of a low-rank run contexts too."""
        width = self.learned.modifiers.shape[1]

        def stacked(rows: nn.ParameterList) -> Tensor:
            found = torch.stack([row.detach().cpu() for row in rows]) if len(rows) else torch.empty(0, 0, width)
            return found if self.low_rank is None else found.half()

        return Concept(
            low_rank=self._low_rank_changes(),
            keys_values={name: weight.detach().half().cpu() for name, weight in self.keys_values.items()},
            modifiers=self.learned.modifiers.detach().cpu().clone(),
            prefixes=stacked(self.learned.prefixes),
            suffixes=stacked(self.learned.suffixes),
            names=self.names,
            base=self.base,
            base_name=self.model.config.name,
            config=dataclasses.asdict(dataclasses.replace(self.config, resume=None)),
        )


def _low_rank(weights: dict[str, nn.Parameter], config: FinetuneConfig) -> LowRankChanges | None:
    """The changes that are trained in place of the weights, where a rank is given."""
    rank = config.training.lora_rank
    if rank is None:
        return None
    if not weights:
        raise UserError(
            f"training.lora_rank={rank} changes keys and values, and training.trainable=none trains none of them"
        )
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    return LowRankChanges(shapes, rank, fitting_seed(config.training.seed, 64))


def _learned_tokens(model: LatentDiffusion, config: FinetuneConfig, images: list[int]) -> LearnedTokens:
    """The modifier tokens and contexts that a run starts from.

    Args:
        images: number of reference images of each concept.
    """
    entries, context = concepts_of(config), config.context
    concept_of = [concept for concept, number in enumerate(images) for _ in range(number)]
    tables = model.text_encoder.token_tables
    modifiers = [torch.cat([initial_embeddings(s.initial_words, table) for table in tables], dim=1) for s in entries]
    number = len(images) if context.shared else sum(images)
    generator = torch.Generator().manual_seed(fitting_seed(config.training.seed, 64))
    return LearnedTokens(
        torch.cat(modifiers),
        *initial_contexts(context, number, model.text_encoder, generator),
        [subject.class_noun for subject in entries],
        [len(rows) for rows in modifiers],
        concept_of,
        concept_of if context.shared else None,
        context.template,
    )
