"""A fine-tuning run: images in, run folder out."""

import dataclasses
import hashlib
import signal
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dci.files import check_folder, write_atomically
from dci.finetuning import distributed
from dci.finetuning.augmentation import LARGEST
from dci.finetuning.callbacks import CheckpointCallback, MetricsLogger, ValidationImages, errors_reported_once, loggers
from dci.finetuning.config import AUTO, GENERATE, FinetuneConfig, concepts_of
from dci.finetuning.config_files import check
from dci.finetuning.dataset import BatchOrder, ConceptDataset
from dci.finetuning.gradients import ProcessesInStep
from dci.finetuning.images import TrainingImage, captions_of, read_references, read_regularization
from dci.finetuning.module import ICOTraining
from dci.finetuning.precision import check_device, lightning_name
from dci.finetuning.regularization import generate
from dci.finetuning.run_folder import CONCEPT_FILE, CONFIG_FILE, Run, find_run, new_run, with_seed
from dci.finetuning.signals import GracefulStop, Interrupted
from ldm import config as configuration
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.lightning import quiet
from ldm.noise import fitting_seed


def finetune(model: LatentDiffusion, config: FinetuneConfig, logdir: Path) -> Path:
    """Fine-tune a model on the images of a concept.

    Args:
        model: the base model, on the device to train on; it is changed.
        config: its paths are absolute, or relative to the current folder.
        logdir: where the run folder is made.

    Returns:
        The run folder: configs/config.yaml, concept.safetensors, metrics.csv, samples/, checkpoints/,
        TensorBoard logs.

    Raises:
        UserError: images or options that training cannot use, a loss that is not a number, a full disk.
        Interrupted: a signal asked to stop; a checkpoint is written.
    """
    check(config)
    check_folder(logdir, "logdir")
    distributed.check_launched(config.training.devices * config.training.nodes)
    check_device(config.training.precision, model.device)
    run = find_run(config, logdir)
    try:
        config = with_seed(config, run)
        if run is not None and run.finished and run.step == config.training.steps:
            distributed.print_rank_zero(f"{run.folder} is finished")
            return run.folder
        with GracefulStop() as stop:
            module, dataset, order = _prepare(model, config, logdir)
            run = run or new_run(config, logdir)
            order.steps = range(run.step, config.training.steps)
            digest = _digest(dataset)
            run.check_origin(module.base, module.model_digest, digest)
            if distributed.rank() == 0:
                content = configuration.to_yaml(dataclasses.replace(config, resume=None))
                write_atomically(run.folder / CONFIG_FILE, content.encode())
            distributed.print_rank_zero(dataset.describe())
            loader = DataLoader(dataset, batch_sampler=order, collate_fn=_as_it_is)
            _fit(module, loader, run, stop, digest)
        return run.folder
    finally:
        if run is not None:
            run.release()


def _prepare(model: LatentDiffusion, config: FinetuneConfig, logdir: Path) -> tuple[ICOTraining, ConceptDataset, BatchOrder]:
    """Read, make and encode the images; nothing is written but generated ones."""
    pl.seed_everything(fitting_seed(config.training.seed, 32), verbose=False)
    references = [_references(model, config, subject.images) for subject in concepts_of(config)]
    module = ICOTraining(model, config, [len(images) for images in references])
    _order(config, 1, int(any(s.regularization for s in concepts_of(config))))  # before anything that takes long
    others = [image for source in _sources(config) for image in _regularization(model, config, *source, logdir)]
    images = [image for part in references for image in part]
    dataset = ConceptDataset(model, images, others, config.data, config.training.seed)
    return module, dataset, _order(config, len(images), len(others))


def _references(model: LatentDiffusion, config: FinetuneConfig, folder: str | None) -> list[TrainingImage]:
    if folder is None:
        raise UserError("data.images must be given: the folder of the concept's images")
    if config.resume not in (None, AUTO) and not Path(folder).is_dir():
        raise UserError(
            f"no folder {folder}: if its images have moved, give data.images=FOLDER (or concepts=) beside resume="
        )
    # An image that will be enlarged is read larger.
    size = model.config.image_size if config.data.augment == "none" else round(LARGEST * model.config.image_size)
    multiple = model.config.size_multiple
    return read_references(folder, config.data, size, distributed.print_rank_zero, multiple)


def _sources(config: FinetuneConfig) -> list[tuple[str, str]]:
    """What the regularization images are: (folder or `generate`, class noun), each once."""
    entries = [(entry.regularization, entry.class_noun) for entry in concepts_of(config) if entry.regularization]
    return list({(folder, noun if folder == GENERATE else ""): (folder, noun) for folder, noun in entries}.values())


def _regularization(
    model: LatentDiffusion, config: FinetuneConfig, folder: str | Path, class_noun: str, logdir: Path
) -> list[TrainingImage]:
    size, most = model.config.image_size, None
    if folder == GENERATE:
        most = config.generate.number
        folder = generate(model, config.generate, class_noun, logdir)
    captions_of(folder)
    multiple = model.config.size_multiple
    return read_regularization(folder, config.data, size, distributed.print_rank_zero, most, multiple)


def _order(config: FinetuneConfig, references: int, others: int) -> BatchOrder:
    training = config.training
    world = training.devices * training.nodes
    share = training.batch_size // world
    most = training.micro_batch or share
    micro_batches = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= most), 1)
    # Before Lightning has started the others, this is the first one.
    process = (distributed.rank(), world)
    return BatchOrder(references, others, training.batch_size, range(0), training.seed, process, micro_batches)


def _fit(module: ICOTraining, loader: DataLoader, run: Run, stop: GracefulStop, digest: str) -> None:
    """Make the steps that are left, then write the concept file."""
    config = module.config
    saving = CheckpointCallback(config, run, stop, digest)
    module.first_step = run.step
    module.prepare()
    if run.state is not None:
        saving.restore_weights(module)
        distributed.print_rank_zero(f"Going on with {run.folder} at step {run.step}")
    if len(loader):
        callbacks = [MetricsLogger(config, run.folder), ValidationImages(config, run.folder), saving]
        trainer = _trainer(config, run.folder, module.model.device, callbacks)
        try:
            with errors_reported_once():
                trainer.fit(module, loader)
        except OSError as error:
            if trainer.strategy.launcher is not None:  # the others would wait for this process for ever
                trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
            raise UserError(f"{saving.no_room(error)}{saving.how_to_go_on()}") from error
        except UserError as error:
            raise UserError(f"{error}: {saving.how_to_go_on()}") from error
        if saving.stopped_by:
            raise Interrupted(f"\nStopped at step {module.steps_done}; {saving.how_to_go_on()}", saving.stopped_by)
    module.check_trained()
    if distributed.rank() == 0:
        module.concept().save(run.folder / CONCEPT_FILE)


def _trainer(config: FinetuneConfig, folder: Path, device: torch.device, callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet()
    training = config.training
    several = training.devices * training.nodes > 1
    if several and device.type == "cpu":
        distributed.round_alike()
    one = "auto" if device.type == "cpu" or device.index is None else [device.index]
    return pl.Trainer(
        accelerator=device.type,
        devices=training.devices if several or one == "auto" else one,
        num_nodes=training.nodes,
        strategy=ProcessesInStep() if several else "auto",
        plugins=[*distributed.environments()],
        use_distributed_sampler=False,
        precision=lightning_name(training.precision),
        max_epochs=1,
        callbacks=callbacks,
        logger=loggers(config, folder) if distributed.rank() == 0 else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _digest(dataset: ConceptDataset) -> str:
    """Sixteen hex digits that change with the images, their order and their captions."""
    digest = hashlib.sha256(dataset.caption_ids.numpy().tobytes())
    for image in dataset.images:
        digest.update(image.pixels.numpy().tobytes())
        if image.mask is not None:
            digest.update(image.mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def _as_it_is(batch: object) -> object:
    return batch
