"""The work of a grid's points, each stage in a process of its own: training, then sampling and scoring.

python -m dci.experiments.cell train '{"config": ..., "options": [...], "logdir": ..., "device": ...}'
python -m dci.experiments.cell score '{"concept": ..., "prompts": ..., "sampling": {...}, "folder": ..., ...}'

`dci.experiments.grid` says what the tasks hold. What a stage has done already is not done again.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.errors import UserError, reported_in_one_line

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> None:
    """Run the stage that the command line names."""
    stage, task = sys.argv[1:] if arguments is None else arguments
    with reported_in_one_line():
        {"train": train, "score": score}[stage](json.loads(task))


def end_with_parent() -> None:
    """Let the system kill this process when the process that started it has died, where it can (Linux)."""
    with suppress(AttributeError, OSError, TypeError):  # macOS has no prctl, Windows no such library
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def train(task: dict[str, Any]) -> None:
    """Train, or go on with it, and put the concept file into the log folder.

    Raises:
        UserError: options or images that training cannot use.
    """
    from dci.finetuning.config_files import finetune_config
    from dci.finetuning.distributed import own_device, rank
    from dci.finetuning.run_folder import CONCEPT_FILE
    from dci.finetuning.signals import Interrupted
    from dci.finetuning.trainer import finetune
    from ldm.checkpoint import load_model
    from ldm.runtime.acceleration import pick_device

    config = finetune_config(task["config"], [*task["options"], "resume=auto"])
    model = load_model(config.model, config.checkpoint, vae=config.vae).to(own_device(pick_device(task["device"])))
    logdir = Path(task["logdir"])
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


def score(task: dict[str, Any]) -> None:
    """Sample a point's images and score them; its result is what makes it done.

    Raises:
        UserError: options that sampling or an encoder cannot use.
    """
    from dci.evaluation.scores import as_json
    from dci.files import write_atomically

    sample(task)
    scores = as_json(evaluate(task))
    content = task["place"] | {"sampling": task["sampling"]} | scores
    write_atomically(Path(task["folder"]) / "result.json", json.dumps(content, indent=1).encode())


def sample(task: dict[str, Any]) -> None:
    """Sample what is missing of a point's images, as sample_dci.py does."""
    from dci.concept.concept_file import Concept
    from dci.concept.prompts import parse_prompt
    from dci.dual_branch.sampling import SampleRequest
    from dci.dual_branch.sampling import sample as sample_images
    from dci.files import file_hash
    from dci.samples.plan import Plan
    from dci.samples.worker import sample_missing
    from dci.samples.writer import SampleFolder

    concept, options = Concept.load(task["concept"]), task["sampling"]
    texts = read_prompts(task["prompts"])
    noun = options["auxiliary_noun"]
    prompts = [parse_prompt(text, concept.names, noun) for text in texts]
    model, given = _load_model(options, concept, task["device"])
    sampling, dual = _options(model, options)
    replaced = concept.replaced(model)
    concept.apply(model)
    facts = {
        "concept": task["concept"],
        "concept_hash": file_hash(task["concept"]),
        "model_hash": concept.base,
        "model_config_hash": file_hash(given["model"]) if Path(given["model"]).suffix in (".yaml", ".yml") else None,
        "negative_prompt": options["negative_prompt"],
        **given,
        **sampling.facts(),
        "dci": dual and dataclasses.asdict(dual),
    }
    named = [
        {"prompt": text, "concept_prompt": prompt.concept, "auxiliary_prompt": prompt.auxiliary}
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    plan = Plan(named, facts, [options["seed"]], options["n_samples"], options["batch_size"])

    def sample_batch(images: list):
        rows, indices, seeds = zip(*((prompts[i.prompt], i.index, i.seed) for i in images), strict=True)
        negative = options["negative_prompt"]
        batch = SampleRequest(list(rows), list(indices), sampling, dual, negative, base=replaced, seeds=list(seeds))
        return sample_images(model, concept, batch)

    with SampleFolder(task["folder"], plan) as folder:
        sample_missing(folder, plan.batches(), sample_batch, lambda numbers, here: None)


def read_prompts(file: str | Path) -> list[str]:
    """Return the prompts of a UTF-8 file, one in each line.

    Raises:
        UserError: there are none, or it is no such file.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: expected a prompt in each line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts: expected one in each line")
    return prompts


def evaluate(task: dict[str, Any]):
    """Return the scores of a point's images."""
    options = task["evaluation"]
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

    from dci.evaluation.evaluate import evaluate_folder, load_encoders
    from ldm.runtime.acceleration import pick_device

    return evaluate_folder(
        task["folder"],
        task["references"],
        load_encoders(options["clip"], options["instance"], options["kid"], pick_device(task["device"])),
        regularization=options["regularization"],
        class_nouns=options["class_noun"],
        scaled_text_score=options["scaled_text_score"],
        cache=Path(task["folder"]) / "features.sqlite",
        batch_size=options["batch_size"],
        resamples=options["resamples"],
        seed=options["seed"],
    )


def _load_model(options: dict[str, Any], concept, device: str):
    """Load the base model onto the device; return it, and what the images' metadata say of it."""
    import functools

    from dci.concept.autoencoder import trained_vae
    from dci.files import content_hash
    from ldm.checkpoint import load_model
    from ldm.runtime.acceleration import PRECISIONS, accelerate, fastest_precision, pick_device

    device = pick_device(device)
    model = options["model"] or concept.config["model"]
    checkpoint = options["checkpoint"] or (None if options["model"] else concept.config.get("checkpoint"))
    vae = None if options["model"] else trained_vae(concept.config)
    if options["precision"] == "auto":
        dtype = functools.partial(fastest_precision, device=device)
    else:
        dtype = PRECISIONS[options["precision"]]
    loaded = load_model(model, checkpoint, dtype=dtype, ema=options["ema"], clip_skip=options["clip_skip"], vae=vae)
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == loaded.dtype)
    accelerate(loaded, device, options["channels_last"], options["compile"])
    given = {"model": model, "checkpoint": checkpoint, "ema": options["ema"], "clip_skip": options["clip_skip"]}
    given |= {"vae": vae, "vae_hash": content_hash(vae)} if vae else {}
    return loaded.to(device), given | {"precision": precision}


_SAMPLING = ("steps", "scale", "eta", "solver", "spacing", "zero_terminal_snr", "height", "width", "vae_tile", "vae_batch",
             "seed")  # fmt: skip
_DUAL = ("agg_time", "agg_lambda", "gain", "token_sharpness", "pixel_sharpness", "auxiliary_weights")


def _options(model, options: dict[str, Any]):
    """Return the sampling options and DCI's, None for plain sampling."""
    from dci.dual_branch.layer_selection import check_layers
    from dci.dual_branch.options import dual_branch, sampling_options

    sampling = sampling_options(model, **{name: options[name] for name in _SAMPLING})
    if options["no_dci"]:
        return sampling, None
    dual = dual_branch(
        model,
        sampling.height,
        sampling.width,
        **{name: options[name] for name in _DUAL},
        layers=options["dci_layers"],
        shared_guidance=False if options["separate_guidance"] else None,
        shared_noise=options["shared_noise"] or None,
    )
    check_layers(model, sampling, dual.layers)
    return sampling, dual


if __name__ == "__main__":
    end_with_parent()
    main()
