"""Between the steps of a run: progress bar, loss curves, checkpoints, images from fixed noise."""

import csv
import dataclasses
import io
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from tqdm import tqdm

from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.sampling import SampleRequest, sample
from dci.files import write_atomically
from dci.finetuning import distributed
from dci.finetuning.checkpoints import Checkpoints
from dci.finetuning.config import FinetuneConfig
from dci.finetuning.gradients import largest_over_processes
from dci.finetuning.module import ICOTraining
from dci.finetuning.run_folder import Run
from dci.finetuning.signals import GracefulStop
from ldm.errors import UserError
from ldm.images import captioned_grid, to_images
from ldm.shipped import program
from ldm.texts import readable, shell_words

METRICS_FILE = "metrics.csv"
_FAILED = 1000  # above every signal's number


def loggers(config: FinetuneConfig, run_folder: Path) -> list[Logger]:
    """Return TensorBoard and Weights & Biases as the configuration asks for them, and can be had."""
    found: list[Logger] = []
    if config.logging.tensorboard:
        if readable(whole := str(run_folder.resolve())) == whole:
            found.append(TensorBoardLogger(run_folder, name="", version=""))
        else:
            name = readable(whole)
            warnings.warn(f"TensorBoard writes into no folder whose name is not UTF-8: {name} goes without", stacklevel=2)
    if config.logging.wandb:
        found.append(WandbLogger(project=config.logging.wandb, name=readable(run_folder.name), save_dir=run_folder))
    return found


@contextmanager
def errors_reported_once() -> Iterator[None]:
    """Keep threads from printing what they cannot write: TensorBoard's raises it again in the main thread."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def _ours(module: pl.LightningModule) -> ICOTraining:
    """The module that is trained, as what it is: Lightning calls back with any."""
    if not isinstance(module, ICOTraining):
        raise TypeError(f"these callbacks are for ICOTraining, not for {type(module).__name__}")
    return module


class MetricsLogger(pl.Callback):
    """Shows the loss in a progress bar, and logs it every so many steps; the first process alone does."""

    def __init__(self, config: FinetuneConfig, run_folder: Path):
        self.config = config
        self.file = run_folder / METRICS_FILE
        self.rows: list[tuple] = []
        self.losses: list[float] = []  # since the last row
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _ours(pl_module)
        if not trainer.is_global_zero:
            return
        self.rows = read_metrics(self.file, module.first_step)
        self.bar = tqdm(total=self.config.training.steps, initial=module.first_step, desc="training", unit="step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object) -> None:
        module = _ours(pl_module)
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


class CheckpointCallback(pl.Callback):
    """Writes checkpoints and concept files, and ends the run when it is asked to or when it cannot go on.

    With several processes the first one writes, and all of them agree after each step whether to stop.
    """

    def __init__(self, config: FinetuneConfig, run: Run, stop: GracefulStop, images: str):
        self.config, self.run, self.stop, self.images = config, run, stop, images
        self.checkpoints = Checkpoints(run.folder / "checkpoints", config.training.keep_last)
        self.stopped_by = 0  # the signal's number

    def restore_weights(self, module: ICOTraining) -> None:
        """Put the weights of the checkpoint, if there is one, into the module."""
        state = self.run.state
        if state is None:
            return
        module.reached |= state.get("reached", module.reached)
        trained = module.trained()
        with torch.no_grad():
            for name, value in state["weights"].items():
                trained[name].copy_(value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _ours(pl_module)
        self._agree_on_the_first_step(module)
        if self.run.state is not None:
            trainer.optimizers[0].load_state_dict(self.run.state["optimizer"])
            trainer.precision_plugin.load_state_dict(self.run.state["precision"])
            self.run.state = {"step": self.run.step}  # the rest is in use, or no longer needed
        self.stop.listen()  # Lightning has taken SIGTERM
        self.stop.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object) -> None:
        module = _ours(pl_module)
        training, step = self.config.training, module.steps_done
        number = largest_over_processes(self.stop.number, module.device)
        last = step == training.steps
        every = training.checkpoint_every
        error = None
        if trainer.is_global_zero:
            try:
                if training.save_every and step % training.save_every == 0:
                    self._check_finite(module, step)
                    module.concept().save(self.checkpoints.folder / f"concept-{step:06}.safetensors")
                if last or number or (every and step % every == 0):
                    self._check_finite(module, step)
                    self._save(trainer, module, step)
            except (OSError, UserError) as caught:
                error = caught
        if largest_over_processes(_FAILED if error else 0, module.device) == _FAILED:
            raise error or UserError("another process could not write")
        if number and not last:
            self.stopped_by = number
            trainer.should_stop = True

    def how_to_go_on(self) -> str:
        """Return which checkpoint is good, and the command that goes on from it."""
        latest = self.checkpoints.latest()
        if latest is None:
            return f"there is no checkpoint yet in {self.run.folder}"
        command = f"{program('train_ico.py', 'train')} --resume {shell_words([str(self.run.folder)])}"
        return f"the last good checkpoint is {latest}; go on with: {command}"

    def no_room(self, error: OSError) -> str:
        """Return what could not be written, and why."""
        return f"cannot write {error.filename or self.run.folder} ({error.strerror or error}): make room; "

    def _check_finite(self, module: ICOTraining, step: int) -> None:
        for name, parameter in module.trained().items():
            if not parameter.detach().half().isfinite().all():  # concept files hold fp16
                raise UserError(f"{name} has values that are not finite, or beyond fp16, after step {step}")

    def _save(self, trainer: pl.Trainer, module: ICOTraining, step: int) -> None:
        state = {
            "base": module.base,
            "model": module.model_digest,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "images": self.images,
            "weights": {name: p.detach().cpu() for name, p in module.trained().items()},
            "reached": module.reached,
            "optimizer": trainer.optimizers[0].state_dict(),
            "precision": trainer.precision_plugin.state_dict(),
        }
        self.checkpoints.save(step, state)

    def _agree_on_the_first_step(self, module: ICOTraining) -> None:
        furthest, nearest = (largest_over_processes(s * module.first_step, module.device) for s in (1, -1))
        if furthest != -nearest:
            raise UserError(
                f"the processes found checkpoints of steps {-nearest} to {furthest}: "
                "give the run itself as resume=, on a disk that all nodes share"
            )


class ValidationImages(pl.Callback):
    """Samples the validation prompts every so many steps, with DCI on the left and without on the right."""

    def __init__(self, config: FinetuneConfig, run_folder: Path):
        self.config, self.folder = config, run_folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object) -> None:
        module = _ours(pl_module)
        every, step = self.config.validation.every, module.steps_done
        if not (every and step % every == 0 and trainer.is_global_zero):
            return
        with trainer.precision_plugin.forward_context(), module.merged():
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
        images, captions = [], []
        for prompt in validation.prompts:
            branches = parse_prompt(prompt, concept.names)
            for dual in (dual_branch(model), None):
                images += to_images(sample(model, concept, SampleRequest(branches, indices, options, dual)))
                captions += [f"{'DCI' if dual else 'plain'}: {prompt}"] * len(indices)
        return captioned_grid(images, captions, 2 * len(indices), max(1, 128 // model.config.image_size))


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


def print_how_to_sample(concept_file: Path, prompt: str, steps: int) -> None:
    """Return which of the run's files is the result, and what to do with it."""
    options = shell_words(["--concept", str(concept_file), "--prompt", prompt])
    command = f"{program('sample_dci.py', 'sample')} {options}"
    distributed.print_rank_zero(
        f"Use {concept_file} (after {steps} steps); the files in checkpoints/ are for resuming and for study\n"
        f"Sample it with: {command}"
    )
