"""A fine-tuning run: pictures in, run folder out."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from dci.config import FinetuneConfig
from dci.data import ConceptDataset, HalfAndHalf
from dci.prompts import parse_prompt
from dci.sampling import sample
from dci.settings import dual_branch, sampling_options
from dci.tokens import modifier_names
from dci.training import ICOTraining
from ldm import config as configuration
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.images import grid, list_pictures, to_pictures
from ldm.lightning import quiet

CONCEPT_FILE = "concept.safetensors"
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_AT_LEAST = {
    0: ("training.weight_decay", "training.seed", "validation.every", "validation.seed", "context.prefix_length",
        "context.suffix_length"),
    1: ("training.steps", "training.batch_size", "training.save_every", "validation.n_samples", "validation.steps"),
}  # fmt: skip
"""Options by the least value that they can have."""


def finetune(model: LatentDiffusion, config: FinetuneConfig, logdir: Path) -> Path:
    """Fine-tune a model on the pictures of a concept.

    Args:
        model: the base model, on the device to train on; it is changed.
        config: its paths are absolute, or relative to the current folder.
        logdir: where the run folder is made.

    Returns:
        The run folder: configs/config.yaml, concept.safetensors, samples/, checkpoints/, TensorBoard logs.

    Raises:
        UserError: pictures or options that training cannot use.
    """
    check(config)
    pl.seed_everything(config.training.seed, verbose=False)
    module = ICOTraining(model, config, len(list_pictures(config.data.images)))
    dataset = ConceptDataset(model, config.data.images, config.data.regularization)
    run_folder = make_run_folder(logdir, config.name)
    configuration.save(config, run_folder / "configs" / "config.yaml")

    generator = torch.Generator().manual_seed(config.training.seed)
    sampler = HalfAndHalf(dataset, config.training.batch_size, config.training.steps, generator)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch)
    _trainer(config, run_folder, model.device).fit(module, loader)
    module.concept().save(run_folder / CONCEPT_FILE)
    return run_folder


def check(config: FinetuneConfig) -> None:
    """Raise UserError for options that no run could use, and for validation prompts without the concept."""
    for least, names in _AT_LEAST.items():
        for name in names:
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            if value is not None and not value >= least:
                raise UserError(f"{name}={value}: expected {least} or more")
    for name in ("learning_rate", "context_learning_rate"):
        value = getattr(config.training, name)
        if not 0 < value < float("inf"):
            raise UserError(f"training.{name}={value}: expected a number above 0")
    if config.training.precision not in _PRECISIONS:
        raise UserError(f"training.precision={config.training.precision}: expected one of {', '.join(_PRECISIONS)}")
    names = modifier_names(len(config.concept.initial_words))
    for prompt in ["a V*", *(config.validation.prompts if config.validation.every else [])]:
        parse_prompt(prompt, names, config.concept.class_noun)


def make_run_folder(logdir: Path, name: str) -> Path:
    """Make and return logdir/<date>_<name>, with a number behind it where that is taken."""
    stem = f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{name}"
    folder, number = logdir / stem, 1
    while folder.exists():
        number += 1
        folder = logdir / f"{stem}-{number}"
    for part in ("checkpoints", "configs", "samples"):
        (folder / part).mkdir(parents=True)
    return folder


def _trainer(config: FinetuneConfig, run_folder: Path, device: torch.device) -> pl.Trainer:
    quiet()
    return pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=config.training.precision,
        max_epochs=1,
        callbacks=[TQDMProgressBar(refresh_rate=10), ValidationPictures(config, run_folder)],
        logger=TensorBoardLogger(run_folder, name="", version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


class ValidationPictures(pl.Callback):
    """Draws pictures of the concept, and saves concept files, every so many steps."""

    def __init__(self, config: FinetuneConfig, run_folder: Path):
        self.config, self.folder = config, run_folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: ICOTraining, *args: object) -> None:
        step = trainer.global_step
        if self.config.validation.every and step % self.config.validation.every == 0:
            self._draw(module, step, trainer.logger)
        if self.config.training.save_every and step % self.config.training.save_every == 0:
            module.concept().save(self.folder / "checkpoints" / f"concept-{step:06}.safetensors")

    def _draw(self, module: ICOTraining, step: int, logger: TensorBoardLogger) -> None:
        validation, model, concept = self.config.validation, module.model, module.concept()
        options = sampling_options(model, steps=validation.steps, seed=validation.seed)
        pictures = []
        for prompt in validation.prompts:
            branches = parse_prompt(prompt, concept.modifier_tokens, concept.class_noun)
            pixels = sample(model, concept, branches, list(range(validation.n_samples)), options, dual_branch(model))
            pictures += to_pictures(pixels)
        sheet = grid(pictures, columns=validation.n_samples)
        sheet.save(self.folder / "samples" / f"step-{step:06}.png")
        logger.experiment.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
