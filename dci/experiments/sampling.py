"""How a grid's images are sampled: the options of sample_dci.py as data, checked before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dci.files import content_hash
from ldm.errors import UserError
from ldm.formats.hub import anchored, is_hub_id
from ldm.shipped import find


@dataclass
class SamplingConfig:
    """How a point's images are sampled: the options of sample_dci.py; null: the concept's model's."""

    n_samples: int = 4  # images of each prompt
    seed: int = 0  # of the images' noise
    batch_size: int = 8
    negative_prompt: str = ""
    steps: int | None = None
    scale: float | None = None
    eta: float | None = None
    solver: str | None = None
    spacing: str | None = None
    zero_terminal_snr: bool | None = None
    height: int | None = None
    width: int | None = None
    original_size: list[int] | None = None  # SDXL: height and width before the image was resized
    crop: list[int] | None = None  # SDXL: top and left of what was cut off
    vae_tile: int | None = None
    vae_batch: int | None = None
    init_image: str | None = None  # the image to start from
    mask: str | None = None  # white where to paint, of that image's size
    strength: float | None = None  # null: 0.75, with a mask 1
    no_dci: bool = False  # plain sampling of the fine-tuned model
    agg_time: float | None = None
    agg_lambda: float | None = None
    gain: float | None = None
    token_sharpness: float | None = None
    pixel_sharpness: float | None = None
    dci_layers: str | None = None
    auxiliary_weights: str | None = None
    separate_guidance: bool = False
    shared_noise: bool = False
    auxiliary_noun: str | None = None  # auto: the candidate with which the base model obeys the prompts best
    auxiliary_candidates: str | None = None  # for auto, with commas; null: from the class noun
    clip: str | None = None  # for auto: the scoring encoder; null: the embedded one, for the embedded model alone
    model: str | None = None  # null: what the concept was trained on
    checkpoint: str | None = None
    vae: str | None = None  # an autoencoder's file or folder; null: what the concept was trained with
    loras: list[str] | None = None  # put on the base model beside the concept: FILE or FILE:0.8
    strength_concept: float | None = None  # factor on the concept's change of the weights; null: 1
    ema: bool = False
    clip_skip: int | None = None
    precision: str = "auto"
    channels_last: bool = False
    compile: bool = False


OTHER_NAMES = {
    "H": "height",
    "W": "width",
    "n": "n_samples",
    "negative": "negative_prompt",
    "layers": "dci_layers",
    "lora": "loras",
    "ddim_steps": "steps",
    "ddim_eta": "eta",
    "config": "model",
    "ckpt": "checkpoint",
}
"""Names by which the programs or Python know some of these options, too."""

LISTS = ("loras", "original_size", "crop")
"""Options whose one value is a list; for several values they take a list of lists."""

_WEIGHTS = ("model", "checkpoint")  # may be ids on the hub
_FILES = ("vae", "init_image", "mask")

ELSEWHERE = {
    "prompt": "a grid samples the prompts of its file: give prompts=FILE",
    "from_file": "it is the grid's: give prompts=FILE",
    "seeds": "they are the grid's, of training and sampling: give seeds=[0,1] beside it, or one seed here",
    "n_iter": "give n_samples",
    "outdir": "it is the grid's: give outdir=FOLDER beside it",
    "shard": "a grid's workers share its points: give workers= beside it",
    "device": "it is the grid's: give device= beside it",
    "concept": "a grid samples the concepts that it trains: give concepts=",
    "class_noun": "a grid samples the concepts that it trains: give concepts=",
    "trigger": "a grid samples the concepts that it trains: give concepts=",
    "verbose": "a point's prompts are in its prompts.json",
    "save_maps": "sample_dci.py shows the branches, of a point's concept.safetensors",
    "save_steps": "sample_dci.py shows the branches, of a point's concept.safetensors",
}
"""Options of sample_dci.py that are no option of a grid's sampling, and what to do instead."""


def known_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names in SamplingConfig, whichever of their names was given."""
    known = {str(name).replace("-", "_"): value for name, value in options.items()}
    return {OTHER_NAMES.get(name, name): value for name, value in known.items()}


def varies(name: str, value: Any) -> bool:
    """Whether an option's value is a list of values, for a setting each."""
    if known_names({name: value}).keys() & set(LISTS):
        return isinstance(value, list) and bool(value) and all(isinstance(entry, list) for entry in value)
    return isinstance(value, list)


def anchor(options: dict[str, Any], root: Path, source: str) -> dict[str, Any]:
    """Return sampling options whose relative paths are seen from a grid's project.

    Raises:
        UserError: an option that a grid has elsewhere.
    """
    found = known_names(options)
    for name in found:
        if name in ELSEWHERE:
            raise UserError(f"{source}: {name} is no option of a grid's sampling: {ELSEWHERE[name]}")

    def whole(value: Any, change: Any) -> Any:
        if isinstance(value, list):
            return [whole(entry, change) for entry in value]
        if value == "":
            raise UserError(f"{source}: a file's name is empty: give it, or leave the option out")
        return change(value) if isinstance(value, str) else value

    for name in _WEIGHTS:
        if name in found:
            found[name] = whole(found[name], lambda path: anchored(path, root))
    for name in (*_FILES, "loras"):
        if name in found:
            found[name] = whole(found[name], lambda path: str(find(path, root)))
    if isinstance(found.get("loras"), str):
        found["loras"] = [found["loras"]]
    return found


def check_sampling(options: SamplingConfig, source: str) -> None:
    """Raise UserError for what would only show after training: values out of range, files that are missing or no use."""
    from dci.concept.loras import check_strength, parse_lora  # with torch, which a grid's workers need not wait for
    from dci.dual_branch.options import checked_dual_branch
    from ldm.images import read_image
    from ldm.masks import read_mask
    from ldm.runtime.acceleration import PRECISIONS

    if options.precision not in ("auto", *PRECISIONS):
        raise UserError(f"{source}: precision={options.precision}: expected one of auto, {', '.join(PRECISIONS)}")
    for name, least in (("n_samples", 1), ("batch_size", 1), ("seed", 0), ("steps", 1), ("clip_skip", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{source}: {name}={value}: expected {least} or more")
    for name in _FILES:
        path = getattr(options, name)
        if path is not None and not Path(path).exists():
            raise UserError(f"{source}: {name}={path}: no such file")
    if options.init_image is None and (options.mask is not None or options.strength is not None):
        raise UserError(f"{source}: {'mask' if options.mask else 'strength'} needs an image to start from: give init_image")
    if options.strength is not None and not 0 <= options.strength <= 1:
        raise UserError(f"{source}: strength={options.strength}: expected 0 (the image itself) to 1 (all steps)")
    try:
        if options.init_image:
            image = read_image(options.init_image)
            if options.mask:
                read_mask(options.mask, image, options.init_image)
        for lora in options.loras or []:
            parse_lora(lora)
        check_strength(strength_of(options))
        checked_dual_branch(dual_settings(vars(options)))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def check_auto_noun(options: SamplingConfig, trained_on: str, concepts: int, source: str) -> None:
    """Raise UserError for an auxiliary noun that could not be chosen, after long work.

    Args:
        trained_on: the model of the training configuration.
        concepts: how many a file holds.
    """
    from dci.evaluation.auxiliary_noun import AUTO
    from dci.evaluation.encoders import check_encoder
    from ldm.checkpoint import read_config

    if options.auxiliary_noun != AUTO:
        return
    if concepts > 1:
        raise UserError(f"{source}: auxiliary_noun={AUTO} is for one concept in a file: name the noun")
    model = Path(options.model or trained_on)
    embedded = model.suffix in (".yaml", ".yml") and read_config(model).name == "tiny"
    if not options.clip and not embedded:
        raise UserError(
            f"{source}: auxiliary_noun={AUTO} needs a CLIP that knows what {model.name} generates: name one, such as "
            "clip=open_clip:ViT-B-32/openai"
        )
    if options.clip:
        try:
            check_encoder(options.clip)
        except UserError as error:
            raise UserError(f"{source}: clip: {error}") from error


def check_on_model(options: SamplingConfig, trained_on: str, source: str) -> None:
    """Raise UserError for options that the model cannot be sampled with, as far as its configuration shows.

    Args:
        trained_on: the model of the training configuration.
    """
    import torch

    from dci.dual_branch.layer_selection import check_layers
    from dci.dual_branch.options import dual_branch, sampling_options
    from ldm.checkpoint import read_config
    from ldm.diffusion import LatentDiffusion

    path = Path(options.model or trained_on)
    for name in filter(None, (options.model, options.checkpoint)):
        if not is_hub_id(name) and not Path(name).exists():
            raise UserError(f"{source}: no model or weights {name}")
    if path.suffix not in (".yaml", ".yml"):
        return
    with torch.device("meta"):  # no memory for weights
        model = LatentDiffusion(read_config(path))
    try:
        sampling = sampling_options(model, **solver_settings(options))
        dual = dual_branch(model, sampling.height, sampling.width, **dual_settings(vars(options)))
        check_layers(model, sampling, dual.layers)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def check_prompts(options: SamplingConfig, prompts: Sequence[str], names: Sequence[Any], source: str) -> None:
    """Raise UserError for prompts that do not name the concepts, or another one.

    Args:
        names: `dci.concept.modifier_tokens.ConceptName` of each concept.
    """
    from dci.concept.prompts import negative_ids, parse_prompt
    from dci.evaluation.auxiliary_noun import AUTO

    noun = None if options.auxiliary_noun == AUTO else options.auxiliary_noun
    try:
        for prompt in prompts:
            parse_prompt(prompt, names, noun)
        negative_ids(options.negative_prompt, names)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def solver_settings(options: SamplingConfig) -> dict[str, Any]:
    """Return the options of the sampler under their names in `ldm.text_to_image.SamplingOptions`."""
    course = ("steps", "scale", "eta", "solver", "spacing", "zero_terminal_snr")
    names = (*course, "height", "width", "vae_tile", "vae_batch", "seed")
    settings = {name: getattr(options, name) for name in names}
    return settings | {name: tuple(sides) for name in ("original_size", "crop") if (sides := getattr(options, name))}


def strength_of(options: SamplingConfig) -> float:
    """Return the factor on the concept's change of the weights."""
    return 1.0 if options.strength_concept is None else options.strength_concept


def dual_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return DCI's settings that are given, under their names in DualBranch."""
    names = ("agg_time", "agg_lambda", "gain", "token_sharpness", "pixel_sharpness", "auxiliary_weights")
    given = {name: options[name] for name in names} | {
        "layers": options["dci_layers"],
        "shared_guidance": False if options["separate_guidance"] else None,
        "shared_noise": options["shared_noise"] or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def contents(options: SamplingConfig) -> dict[str, str]:
    """Return the digests of the files that images are made from besides the concept and its model."""
    from dci.concept.loras import parse_lora

    files = [getattr(options, name) for name in _FILES if getattr(options, name)]
    return {str(file): content_hash(file) for file in [*files, *(parse_lora(lora)[0] for lora in options.loras or [])]}
