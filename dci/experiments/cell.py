"""The work of a grid's points, each stage in a process of its own: training, then sampling and scoring.

python -m dci.experiments.cell train '{"config": ..., "options": [...], "logdir": ..., "device": ...}'
python -m dci.experiments.cell score '{"concept": ..., "prompts": ..., "sampling": {...}, "folder": ..., ...}'

`dci.experiments.tasks` defines the tasks. What a stage has done already is not done again.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dci.experiments.sampling import SamplingConfig, dual_settings, solver_settings, strength_of
from dci.experiments.tasks import ScoreTask, TrainTask, from_json
from dci.files import read_prompts
from ldm.errors import reported_in_one_line

if TYPE_CHECKING:
    from dci.evaluation.scores import Scores
    from dci.samples.image_metadata import SamplingMetadata

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> None:
    """Run the stage that the command line names."""
    stage, task = sys.argv[1:] if arguments is None else arguments
    with reported_in_one_line():
        if stage == "train":
            train(from_json(TrainTask, task))
        else:
            score(from_json(ScoreTask, task))


def end_with_parent() -> None:
    """Let the system kill this process when the process that started it has died, where it can (Linux)."""
    with suppress(AttributeError, OSError, TypeError):  # macOS has no prctl, Windows no such library
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def train(task: TrainTask) -> None:
    """Train, or go on with it, and put the concept file into the log folder.

    Raises:
        UserError: options or images that training cannot use.
    """
    from dci.concept.loras import load_with_loras
    from dci.finetuning.config_files import finetune_config
    from dci.finetuning.distributed import own_device, rank
    from dci.finetuning.run_folder import CONCEPT_FILE
    from dci.finetuning.signals import Interrupted
    from dci.finetuning.trainer import finetune
    from ldm.runtime.acceleration import pick_device

    config = finetune_config(task.config, [*task.options, "resume=auto"])
    model = load_with_loras(config.model, config.checkpoint, config.loras, config.vae)
    model = model.to(own_device(pick_device(task.device)))
    logdir = Path(task.logdir)
    try:
        run_folder = finetune(model, config, logdir)
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(stop.exit_code)
    if rank() == 0:
        _link(run_folder / CONCEPT_FILE, logdir / CONCEPT_FILE)


def _link(file: Path, place: Path) -> None:
    beside = place.with_name(f".{place.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(file.resolve().relative_to(place.parent.resolve()))
    except OSError:  # not everybody may make links on Windows
        beside.write_bytes(file.read_bytes())
    beside.replace(place)


def score(task: ScoreTask) -> None:
    """Sample a point's images and score them; its result is what makes it done.

    Raises:
        UserError: options that sampling or an encoder cannot use.
    """
    from dci.evaluation.grid_result import GridResult

    sample(task)
    result = GridResult(**vars(task.place), scores=evaluate(task), sampling=asdict(task.sampling))
    result.save(Path(task.folder) / "result.json")


def sample(task: ScoreTask) -> None:
    """Sample what is missing of a point's images, as sample_dci.py does."""
    from dci.concept.concept_file import Concept
    from dci.concept.loras import lora_hashes
    from dci.concept.prompts import parse_prompt
    from dci.pipeline import Pipeline
    from dci.samples.image_metadata import prompt_metadata, sampling_metadata, with_concept
    from dci.samples.plan import Plan
    from dci.samples.worker import sample_missing
    from dci.samples.writer import SampleFolder

    concept, options = Concept.load(task.concept), task.sampling
    texts = read_prompts(task.prompts)
    for text in texts:  # refuse them before the model is loaded
        parse_prompt(text, concept.names, options.auxiliary_noun)
    model, base, concept = _load_model(options, concept, task.device)
    noun = _noun(options, model, concept, texts)
    prepared = Pipeline.of(model, concept).prepare(_request(options, texts, noun))
    prepared.warn()
    loras = lora_hashes(options.loras or [])
    metadata = sampling_metadata(base, prepared, options.init_image, options.mask, loras)
    metadata = _as_a_grid_tells(with_concept(metadata, prepared, [task.concept], strength_of(options)))
    plan = Plan(prompt_metadata(prepared), metadata, [options.seed], options.n_samples, options.batch_size)

    def sample_batch(images: list):
        prompts, indices, seeds = zip(*((i.prompt, i.number, i.seed) for i in images), strict=True)
        return prepared.sample(prompts, indices, seeds)

    with SampleFolder(task.folder, plan) as folder:
        sample_missing(folder, plan.batches(), sample_batch, lambda numbers, here: None)


def evaluate(task: ScoreTask) -> "Scores":
    """Return the scores of a point's images."""
    options = task.evaluation
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

    from dci.evaluation.evaluate import Scoring, evaluate_folder, load_encoders
    from ldm.runtime.acceleration import pick_device

    encoders = load_encoders(options.clip, options.instance, options.kid, pick_device(task.device))
    scoring = Scoring(
        options.regularization,
        options.class_noun,
        options.scaled_text_score,
        options.batch_size,
        options.resamples,
        options.seed,
        options.object_only,
    )
    cache = Path(task.folder) / "features.sqlite"
    return evaluate_folder(task.folder, task.references, encoders, scoring, cache)


def _load_model(options: SamplingConfig, concept, device: str):
    """Load the base model onto the device; return it, what it is, and the concept for it."""
    import functools

    from dci.concept.loras import add_trained_loras, on_loras
    from dci.samples.image_metadata import LoadedModel, precision_name
    from ldm.checkpoint import fingerprint, load_model
    from ldm.runtime.acceleration import PRECISIONS, accelerate, fastest_precision, pick_device

    device = pick_device(device)
    trained = concept.trained_on
    model = options.model or trained.model
    checkpoint = options.checkpoint or (None if options.model else trained.checkpoint)
    vae = options.vae or (None if options.model else trained.own_vae())
    auto = functools.partial(fastest_precision, device=device)
    dtype = auto if options.precision == "auto" else PRECISIONS[options.precision]
    loaded = load_model(model, checkpoint, dtype=dtype, ema=options.ema, clip_skip=options.clip_skip, vae=vae)
    accelerate(loaded, device, options.channels_last, options.compile)
    add_trained_loras(loaded, concept, options.loras or [])
    base = LoadedModel(
        model, checkpoint, fingerprint(loaded), precision_name(loaded.dtype), options.ema, options.clip_skip, vae
    )
    concept = on_loras(concept, loaded, options.loras or [], strength_of(options))
    return loaded.to(device), base, concept


def _noun(options: SamplingConfig, model, concept, prompts: list[str]) -> str | None:
    """Return the auxiliary noun; for `auto` print how the candidates did with the base model."""
    from dci.dual_branch.options import sampling_options
    from dci.evaluation.auxiliary_noun import AUTO, choose_noun, describe

    if options.auxiliary_noun != AUTO:
        return options.auxiliary_noun
    sampling = sampling_options(model, steps=options.steps, scale=options.scale, seed=options.seed)
    scores = choose_noun(model, concept, prompts, sampling, options.clip, options.auxiliary_candidates)
    print(describe(scores), flush=True)
    return scores[0].noun


def _request(options: SamplingConfig, prompts: list[str], noun: str | None):
    """Return what a point is to be sampled with, as the pipeline takes it."""
    from dci.pipeline import Request
    from ldm.images import read_image
    from ldm.masks import read_mask

    image = read_image(options.init_image) if options.init_image else None
    mask = read_mask(options.mask, image, options.init_image) if options.mask and image is not None else None
    settings = solver_settings(options) | dual_settings(vars(options))
    return Request(
        prompts,
        options.n_samples,
        dci=not options.no_dci,
        negative=options.negative_prompt,
        auxiliary_noun=noun,
        init_image=image,
        mask=mask,
        strength=options.strength,
        batch_size=options.batch_size,
        settings=settings,
    )


def _as_a_grid_tells(metadata: "SamplingMetadata") -> "SamplingMetadata":
    """A point's record without the version, for any may go on with it, and without an image to start from where is none."""
    from dci.samples.image_metadata import LEFT_OUT

    start = ("init_image", "init_image_hash", "mask", "mask_hash", "strength")
    none: dict[str, Any] = {name: LEFT_OUT for name in start if getattr(metadata, name) is None}
    return replace(metadata, version=LEFT_OUT, **none)


if __name__ == "__main__":
    end_with_parent()
    main()
