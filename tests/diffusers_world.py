"""Pipelines of diffusers with tiny random weights, saved by diffusers, and our model with the same weights."""

import atexit
import copy
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import diffusers
import torch
from helpers import learned_concept
from tiny_models import make, small_v1, small_v2, small_xl
from transformers import CLIPTokenizer

from dci.concept.concept_file import Concept
from dci.concept.prompts import parse_prompt
from dci.diffusers import DCIPipeline
from ldm.checkpoint import load_weights
from ldm.diffusion import LatentDiffusion
from ldm.formats.diffusers_export import write_tokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# Two levels, one of them with attention: four cross-attention layers, the middle's among them.
LEVELS = {"num_res_blocks": 1, "attention_resolutions": [1], "channel_mult": [1, 2]}
SMALLER = {
    name: lambda whole=whole: dataclasses.replace(whole(), unet=dataclasses.replace(whole().unet, **LEVELS))
    for name, whole in (("sd1", small_v1), ("sd2", small_v2))
} | {"xl": small_xl}
GAIN = 20.0  # of the evidence: 256 pixels in the finest layer


@dataclasses.dataclass
class World:
    """One family: our base model, a concept on it, and a folder that diffusers saved."""

    base: LatentDiffusion
    model: LatentDiffusion  # with the concept applied
    concept: Concept
    file: Path
    folder: Path
    prediction: str  # epsilon or v_prediction

    def concept_ids(self, prompt):
        """The token ids of the concept's branch, as our own text encoder reads them."""
        return parse_prompt(prompt, self.concept.names).concept_ids

    def plain(self, **options):
        """Load the pipeline as diffusers' users do."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipe(self, kind=None, concept=True, **components):
        """Load the pipeline, another of its kinds if one is named, with DCI and the concept."""
        pipe = self.plain()
        if kind is not None:
            checked = {} if "text_encoder_2" in pipe.components else {"requires_safety_checker": False}
            pipe = getattr(diffusers, kind)(**pipe.components, **components, **checked)
            pipe.set_progress_bar_config(disable=True)
        pipe = DCIPipeline.from_pipe(pipe)
        if concept:
            pipe.load_concept(self.file)
        return pipe

    def scheduler(self, kind, **options):
        """Return one of diffusers' schedulers for the family."""
        return getattr(diffusers, kind)(**SCHEDULE, prediction_type=self.prediction, **options)


def learned(model):
    """A concept that differs from its base, and the model with it applied."""
    concept = learned_concept(copy.deepcopy(model), "dog", 0.05)
    # A concept keeps fp16: what it sets is not what was trained, to the last bit.
    model = copy.deepcopy(model)
    concept.apply(model)
    return concept, model.requires_grad_(False)


def save(theirs, tokenizers, folder):
    """Save a whole pipeline with diffusers."""
    prediction = "v_prediction" if theirs.config.schedule.parameterization == "v" else "epsilon"
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    theirs.vae.register_to_config(scaling_factor=theirs.config.latent_scale)
    networks = {"vae": theirs.vae, "text_encoder": theirs.text, "unet": theirs.unet, "scheduler": scheduler}
    if theirs.text_2 is None:
        pipe = diffusers.StableDiffusionPipeline(
            **networks, tokenizer=tokenizers[0], safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        theirs.text_2.config.eos_token_id = 2  # as the published one has it
        pipe = diffusers.StableDiffusionXLPipeline(
            **networks,
            tokenizer=tokenizers[0],
            text_encoder_2=theirs.text_2,
            tokenizer_2=tokenizers[1],
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    return prediction


def tokenizers(config, folder):
    """One for each text encoder, padding as it does."""
    made = []
    for encoder in filter(None, (config.text_encoder, config.text_encoder_2)):
        write_tokenizer(folder / str(len(made)), encoder)
        made.append(CLIPTokenizer.from_pretrained(folder / str(len(made))))
    return made


@functools.cache
def world(name):
    """Make a family, "sd1", "sd2" or "xl", once."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix=name))
    atexit.register(shutil.rmtree, folder)
    with torch.no_grad():
        theirs = make(SMALLER[name]())
    base = LatentDiffusion(theirs.config)
    load_weights(base, theirs.state, "random weights")
    base.eval().requires_grad_(False)
    prediction = save(theirs, tokenizers(theirs.config, folder / "tokenizers"), folder / "model")
    concept, model = learned(base)
    concept.save(folder / "concept.safetensors")
    return World(base, model, concept, folder / "concept.safetensors", folder / "model", prediction)
