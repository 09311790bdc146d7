"""Watching a run: progress bar, loss curves, pictures from fixed noise."""

import csv
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from tqdm import tqdm

from dci import processes
from dci.config import FinetuneConfig
from dci.files import write_atomically
from dci.prompts import parse_prompt
from dci.sampling import sample
from dci.settings import dual_branch, sampling_options
from dci.training import ICOTraining
from ldm.images import captioned_grid, to_pictures

METRICS_FILE = "metrics.csv"


def loggers(config: FinetuneConfig, run_folder: Path) -> list[Logger]:
    """Return TensorBoard and Weights & Biases as the configuration asks for them."""
    found = []
    if config.logging.tensorboard:
        found.append(TensorBoardLogger(run_folder, name="", version=""))
    if config.logging.wandb:
        found.append(WandbLogger(project=config.logging.wandb, name=run_folder.name, save_dir=run_folder))
    return found


@contextmanager
def errors_told_once() -> Iterator[None]:
    """Keep threads from printing what they cannot write: TensorBoard's raises it again in the main thread."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


class Watching(pl.Callback):
    """Shows the loss in a progress bar, and logs it every so many steps; the first process alone does."""

    def __init__(self, config: FinetuneConfig, run_folder: Path):
        self.config = config
        self.file = run_folder / METRICS_FILE
        self.rows: list[tuple] = []
        self.losses: list[float] = []  # since the last row
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, module: ICOTraining) -> None:
        if not trainer.is_global_zero:
            return
        self.rows = read_metrics(self.file, module.first_step)
        self.bar = tqdm(total=self.config.training.steps, initial=module.first_step, desc="training", unit="step")

    def on_train_batch_end(self, trainer: pl.Trainer, module: ICOTraining, *_: object) -> None:
        if self.bar is None:
            return
        loss = module.step_loss
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self.bar.update()
        self.losses.append(loss)
        step = module.steps_done
        if step % self.config.logging.every == 0 or step == self.config.training.steps:
            mean = sum(self.losses) / len(self.losses)
            self.losses.clear()
            self.rows.append((step, repr(mean), repr(rate)))
            write_metrics(self.file, self.rows)
            for logger in trainer.loggers:
                logger.log_metrics({"loss": mean, "learning_rate": rate}, step)

    def on_fit_end(self, *_: object) -> None:
        self._close()

    def on_exception(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class ValidationPictures(pl.Callback):
    """Draws the validation prompts every so many steps, with DCI on the left and without on the right."""

    def __init__(self, config: FinetuneConfig, run_folder: Path):
        self.config, self.folder = config, run_folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: ICOTraining, *_: object) -> None:
        every, step = self.config.validation.every, module.steps_done
        if not (every and step % every == 0 and trainer.is_global_zero):
            return
        with trainer.precision_plugin.forward_context():
            sheet = self._draw(module)
        content = io.BytesIO()
        sheet.save(content, "PNG")
        write_atomically(self.folder / "samples" / f"step-{step:06}.png", content.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("validation", [sheet], step)

    def _draw(self, module: ICOTraining):
        validation, model, concept = self.config.validation, module.model, module.concept()
        options = sampling_options(model, steps=validation.steps, seed=validation.seed)
        indices = list(range(validation.n_samples))
        pictures, captions = [], []
        for prompt in validation.prompts:
            branches = parse_prompt(prompt, concept.modifier_tokens, concept.class_noun, several=concept.several)
            for dual in (dual_branch(model), None):
                pictures += to_pictures(sample(model, concept, branches, indices, options, dual))
                captions += [f"{'DCI' if dual else 'plain'}: {prompt}"] * len(indices)
        return captioned_grid(pictures, captions, 2 * len(indices), max(1, 128 // model.config.image_size))


def read_metrics(file: Path, until: int) -> list[tuple]:
    """Return the rows of an earlier part of the run, up to a step; later ones will be made again."""
    if not file.is_file():
        return []
    with open(file, newline="") as lines:
        return [tuple(row) for row in list(csv.reader(lines))[1:] if int(row[0]) <= until]


def write_metrics(file: Path, rows: list[tuple]) -> None:
    """Write the table of losses: step, mean loss since the row before, learning rate of the first group."""
    content = io.StringIO()
    csv.writer(content).writerows([("step", "loss", "learning_rate"), *rows])
    write_atomically(file, content.getvalue().encode())


def say_how_to_draw(concept_file: Path, prompt: str, steps: int) -> None:
    """Tell which of the run's files is the result, and what to do with it."""
    processes.say(
        f"Use {concept_file} (after {steps} steps); the files in checkpoints/ are for resuming and for study\n"
        f'Draw it with: python scripts/sample_dci.py --concept {concept_file} --prompt "{prompt}"'
    )
