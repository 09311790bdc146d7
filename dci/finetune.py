"""A fine-tuning run: pictures in, run folder out."""

import dataclasses
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dci import processes
from dci.augment import LARGEST
from dci.checkpoints import Checkpoints
from dci.config import GENERATE, FinetuneConfig, subjects
from dci.data import BatchOrder, ConceptDataset
from dci.files import write_atomically
from dci.generation import generate
from dci.gradients import ProcessesInStep, largest_over_processes
from dci.interruption import Interrupted, Interruption
from dci.pictures import Picture, captioned_files, read_references, read_regularization
from dci.precision import check_device, lightning_name
from dci.runs import CONCEPT_FILE, CONFIG_FILE, Run, find_run, new_run
from dci.settings import check
from dci.training import ICOTraining
from dci.watching import ValidationPictures, Watching, errors_told_once, loggers
from ldm import config as configuration
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.lightning import quiet

_FAILED = 1000  # above every signal's number


def finetune(model: LatentDiffusion, config: FinetuneConfig, logdir: Path) -> Path:
    """Fine-tune a model on the pictures of a concept.

    Args:
        model: the base model, on the device to train on; it is changed.
        config: its paths are absolute, or relative to the current folder.
        logdir: where the run folder is made.

    Returns:
        The run folder: configs/config.yaml, concept.safetensors, metrics.csv, samples/, checkpoints/,
        TensorBoard logs.

    Raises:
        UserError: pictures or options that training cannot use, a loss that is not a number, a full disk.
        Interrupted: a signal asked to stop; a checkpoint is written.
    """
    check(config)
    processes.check_launched(config.training.devices * config.training.nodes)
    check_device(config.training.precision, model.device)
    run = find_run(config, logdir)
    try:
        if run is not None and run.finished and run.step == config.training.steps:
            processes.say(f"{run.folder} is finished")
            return run.folder
        with Interruption() as interruption:
            module, dataset, order = _prepare(model, config, logdir)
            run = run or new_run(config, logdir)
            order.steps = range(run.step, config.training.steps)
            if processes.rank() == 0:
                content = configuration.to_yaml(dataclasses.replace(config, resume=None))
                write_atomically(run.folder / CONFIG_FILE, content.encode())
            processes.say(dataset.describe())
            loader = DataLoader(dataset, batch_sampler=order, collate_fn=_as_it_is)
            _fit(module, loader, run, interruption, _digest(dataset))
        return run.folder
    finally:
        if run is not None:
            run.release()


def _prepare(
    model: LatentDiffusion, config: FinetuneConfig, logdir: Path
) -> tuple[ICOTraining, ConceptDataset, BatchOrder]:
    """Read, make and encode the pictures; nothing is written but generated ones."""
    pl.seed_everything(config.training.seed, verbose=False)
    references = [_references(model, config, subject.images) for subject in subjects(config)]
    module = ICOTraining(model, config, [len(pictures) for pictures in references])
    _order(config, 1, int(any(s.regularization for s in subjects(config))))  # before anything that takes long
    others = [p for s in subjects(config) if s.regularization for p in _regularization(model, config, s, logdir)]
    pictures = [picture for part in references for picture in part]
    dataset = ConceptDataset(model, pictures, others, config.data, config.training.seed)
    return module, dataset, _order(config, len(pictures), len(others))


def _references(model: LatentDiffusion, config: FinetuneConfig, folder: str) -> list[Picture]:
    # A picture that will be enlarged is read larger.
    size = model.config.image_size if config.data.augment == "none" else round(LARGEST * model.config.image_size)
    return read_references(folder, config.data, size, processes.say)


def _regularization(model: LatentDiffusion, config: FinetuneConfig, subject: Any, logdir: Path) -> list[Picture]:
    size, most, folder = model.config.image_size, None, subject.regularization
    if folder == GENERATE:
        most = config.generate.number
        folder = generate(model, config.generate, subject.class_noun, logdir)
    captioned_files(folder)
    return read_regularization(folder, config.data, size, processes.say, most)


def _order(config: FinetuneConfig, references: int, others: int) -> BatchOrder:
    training = config.training
    world = training.devices * training.nodes
    share = training.batch_size // world
    most = training.micro_batch or share
    micro_batches = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= most), 1)
    # Before Lightning has started the others, this is the first one.
    process = (processes.rank(), world)
    return BatchOrder(references, others, training.batch_size, range(0), training.seed, process, micro_batches)


def _fit(module: ICOTraining, loader: DataLoader, run: Run, interruption: Interruption, pictures: str) -> None:
    """Make the steps that are left, then write the concept file."""
    config = module.config
    saving = Saving(config, run, interruption, pictures)
    module.first_step = run.step
    module.prepare()
    if run.state is not None:
        saving.restore_weights(module)
        processes.say(f"Going on with {run.folder} at step {run.step}")
    if loader.batch_sampler.steps:
        callbacks = [Watching(config, run.folder), ValidationPictures(config, run.folder), saving]
        trainer = _trainer(config, run.folder, module.model.device, callbacks)
        try:
            with errors_told_once():
                trainer.fit(module, loader)
        except OSError as error:
            if trainer.strategy.launcher is not None:  # the others would wait for this process for ever
                trainer.strategy.launcher.kill(signal.SIGKILL)
            raise UserError(f"{saving.no_room(error)}{saving.how_to_go_on()}") from error
        except UserError as error:
            raise UserError(f"{error}: {saving.how_to_go_on()}") from error
        if saving.stopped_by:
            raise Interrupted(f"\nStopped at step {module.steps_done}; {saving.how_to_go_on()}", saving.stopped_by)
    module.check_trained()
    if processes.rank() == 0:
        module.concept().save(run.folder / CONCEPT_FILE)


def _trainer(config: FinetuneConfig, folder: Path, device: torch.device, callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet()
    training = config.training
    several = training.devices * training.nodes > 1
    if several and device.type == "cpu":
        processes.round_alike()
    one = "auto" if device.type == "cpu" or device.index is None else [device.index]
    return pl.Trainer(
        accelerator=device.type,
        devices=training.devices if several or one == "auto" else one,
        num_nodes=training.nodes,
        strategy=ProcessesInStep() if several else "auto",
        plugins=processes.environments(),
        use_distributed_sampler=False,
        precision=lightning_name(training.precision),
        max_epochs=1,
        callbacks=callbacks,
        logger=loggers(config, folder) if processes.rank() == 0 else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Saving(pl.Callback):
    """Writes checkpoints and concept files, and ends the run when it is asked to or when it cannot go on.

    With several processes the first one writes, and all of them agree after each step whether to stop.
    """

    def __init__(self, config: FinetuneConfig, run: Run, interruption: Interruption, pictures: str):
        self.config, self.run, self.interruption, self.pictures = config, run, interruption, pictures
        self.checkpoints = Checkpoints(run.folder / "checkpoints", config.training.keep_last)
        self.stopped_by = 0  # the signal's number
        if run.state is not None and run.state["pictures"] != pictures:
            raise UserError(f"the pictures or captions have changed since {run.folder} was begun: "
                            "put the old ones back, or start a new run")  # fmt: skip

    def restore_weights(self, module: ICOTraining) -> None:
        """Put the checkpoint's weights into the module.

        Raises:
            UserError: it belongs to another base model.
        """
        if self.run.state["base"] != module.base:
            raise UserError(f"{self.run.folder} was trained on another base model: give its own with model= and checkpoint=")
        module.reached |= self.run.state.get("reached", module.reached)
        trained = module.trained()
        with torch.no_grad():
            for name, value in self.run.state["weights"].items():
                trained[name].copy_(value)

    def on_train_start(self, trainer: pl.Trainer, module: ICOTraining) -> None:
        self._agree_on_the_first_step(module)
        if self.run.state is not None:
            trainer.optimizers[0].load_state_dict(self.run.state["optimizer"])
            trainer.precision_plugin.load_state_dict(self.run.state["precision"])
            self.run.state = {"step": self.run.step}  # the rest is in use, or no longer needed
        self.interruption.listen()  # Lightning has taken SIGTERM
        self.interruption.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: ICOTraining, *_: object) -> None:
        training, step = self.config.training, module.steps_done
        number = largest_over_processes(self.interruption.number, module.device)
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
        """Say which checkpoint is good, and the command that goes on from it."""
        latest = self.checkpoints.latest()
        if latest is None:
            return f"there is no checkpoint yet in {self.run.folder}"
        return f"the last good checkpoint is {latest}; go on with: python scripts/train_ico.py --resume {self.run.folder}"

    def no_room(self, error: OSError) -> str:
        """Say what could not be written, and why."""
        return f"cannot write {error.filename or self.run.folder} ({error.strerror or error}): make room; "

    def _check_finite(self, module: ICOTraining, step: int) -> None:
        for name, parameter in module.trained().items():
            if not parameter.detach().half().isfinite().all():  # concept files hold fp16
                raise UserError(f"{name} has values that are not finite, or beyond fp16, after step {step}")

    def _save(self, trainer: pl.Trainer, module: ICOTraining, step: int) -> None:
        state = {
            "base": module.base,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "pictures": self.pictures,
            "weights": {name: p.detach().cpu() for name, p in module.trained().items()},
            "reached": module.reached,
            "optimizer": trainer.optimizers[0].state_dict(),
            "precision": trainer.precision_plugin.state_dict(),
        }
        self.checkpoints.save(step, state)

    def _agree_on_the_first_step(self, module: ICOTraining) -> None:
        furthest, nearest = (largest_over_processes(s * module.first_step, module.device) for s in (1, -1))
        if furthest != -nearest:
            raise UserError(f"the processes found checkpoints of steps {-nearest} to {furthest}: "
                            "give the run itself with --resume, on a disk that all nodes share")  # fmt: skip


def _digest(dataset: ConceptDataset) -> str:
    """Sixteen hex digits that change with the pictures, their order and their captions."""
    digest = hashlib.sha256(dataset.caption_ids.numpy().tobytes())
    for picture in dataset.pictures:
        digest.update(picture.pixels.numpy().tobytes())
        if picture.mask is not None:
            digest.update(picture.mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def _as_it_is(batch: object) -> object:
    return batch
