"""What the trainings of all parts share: optimizer, averaged weights, resuming."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from ldm.errors import UserError
from ldm.lightning import quiet
from ldm.pretraining.config import PretrainConfig

Network = TypeVar("Network", bound=nn.Module)


class PretrainingModule(pl.LightningModule, Generic[Network]):
    """AdamW with warm-up and late cosine decay, and an exponential average of the weights."""

    def __init__(self, network: Network, config: PretrainConfig):
        super().__init__()
        self.network: Network = network
        self.config = config
        self.samples_seen = 0  # kept in checkpoints, as batches may differ between sittings
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema)).requires_grad_(False)

    def averaged(self) -> Network:
        """Return the network with the averaged weights, which are the ones kept."""
        return cast("Network", self.average.module)

    def on_train_start(self) -> None:
        # Every process, and every sitting, has noise of its own.
        torch.manual_seed((self.config.seed + self.global_step) * 1000 + self.global_rank)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters = [p for p in self.parameters() if p.requires_grad]  # the average's need none
        optimizer = torch.optim.AdamW(parameters, self.config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Share of the full learning rate at a step."""
        start = self.config.decay_from * self.config.steps
        progress = min(1.0, max(0.0, (step - start) / max(self.config.steps - start, 1)))
        return min(1.0, (step + 1) / self.config.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)

    def on_train_batch_end(self, *args: object) -> None:
        # A young average follows fast, else the random first weights would linger in it.
        decay = min(self.config.ema, (1 + self.global_step) / (10 + self.global_step))
        self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.average.update_parameters(self.network)

    def on_train_batch_start(self, *args: object) -> None:
        self.samples_seen += self.config.batch_size * self.config.devices

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["samples_seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.samples_seen = checkpoint["samples_seen"]


def fit(module: PretrainingModule, dataset: Dataset, folder: Path) -> None:
    """Train to `config.steps` steps; an interrupted run goes on from its last checkpoint in `folder`."""
    quiet()
    config = module.config
    pl.seed_everything(config.seed, verbose=False)
    loader = DataLoader(
        dataset, config.batch_size, shuffle=True, drop_last=True, collate_fn=getattr(dataset, "collate", None)
    )
    checkpoint = ModelCheckpoint(
        folder, save_last=True, save_top_k=0, every_n_train_steps=config.checkpoint_every, enable_version_counter=False
    )
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        precision=config.precision,  # type: ignore[arg-type]  # Lightning checks the name
        max_steps=config.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[checkpoint, TQDMProgressBar(refresh_rate=20)],
        logger=pl.loggers.CSVLogger(folder, name="log"),  # a resumed run writes a further version
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=False)
    if trainer.global_rank:
        sys.exit()  # all processes hold the same weights: the first one saves them


def restore(module: PretrainingModule, dataset: Dataset, folder: Path) -> None:
    """Put the last checkpoint of `folder` into the module, as `fit` would leave it; `dataset` is not used."""
    last = folder / "last.ckpt"
    if not last.is_file():
        raise UserError(f"no checkpoint {last}: train first, then export")
    content = torch.load(last, map_location="cpu", weights_only=False)
    module.load_state_dict(content["state_dict"])
    module.on_load_checkpoint(content)
    print(f"{last}: step {content['global_step']}, {module.samples_seen} samples seen")


Finish = Callable[[PretrainingModule, Dataset, Path], None]
"""Brings a module to its last state: `fit` by training it, `restore` from its last checkpoint."""
