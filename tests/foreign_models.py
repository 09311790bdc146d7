"""Small models, concepts that change them, and diffusers' pipelines with the same weights."""

import dataclasses
import warnings

import tiny_models
import torch
from diffusers import StableDiffusionPipeline

from dci.concept.concept_file import Concept, LowRank
from dci.concept.foreign.layers import Layers
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import sampling_options
from dci.dual_branch.sampling import BranchContexts, sample_latents
from ldm.checkpoint import fingerprint, load_weights
from ldm.config import ModelConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.formats import presets
from ldm.formats.diffusers_export import write_folder

PROMPT = "photo of a V* cat on the beach"


def sd_v1_widths():
    """Stable Diffusion 1.x in width, with fewer levels and blocks."""
    unet = UNetConfig(num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2, 1])
    return ModelConfig(
        name="sd-v1",
        image_size=16,
        unet=unet,
        autoencoder=tiny_models.SMALL_VAE,
        text_encoder=TextEncoderConfig(layers=2),
        sampling=presets.sampling(),
    )


CONFIGS = {"v1": tiny_models.small_v1, "v2": tiny_models.small_v2, "SD 1.x widths": sd_v1_widths}


def model_of(config):
    """A model with random weights, which fp16 holds exactly."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    load_weights(model, {n: tiny_models.random_weight(t.shape) for n, t in model.state_dict().items()}, "random weights")
    return model.eval().requires_grad_(False)


def concept_of(model, which=(".attn2.to_k.weight", ".attn2.to_v.weight"), size=1.0, tokens=2):
    """A concept as training leaves it: whole weights, and learned tokens."""
    state = model.state_dict()
    changed = {n: (w + size * w.std() * torch.randn(w.shape)).half() for n, w in state.items() if n.endswith(which)}
    width = sum(table.shape[1] for table in model.text_encoder.token_tables)
    rows = 0.05 * torch.randn(tokens, width)
    names = tuple(f"<new{i + 1}>" for i in range(tokens))
    none = torch.zeros(0, 0, width)
    return Concept(changed, rows, none, none, (ConceptName(names, "cat"),), fingerprint(model), model.config.name, {})


def lora_concept(model, ranks=(1, 2, 4), parts=("to_q", "proj_in", "conv1", "fc1", "v_proj", "time_emb_proj")):
    """A concept as an imported LoRA leaves it: changes of mixed ranks in any layer, convolutions and texts too."""
    layers, low_rank = Layers.of(model.config), {}
    named = [*layers.unet.items(), *layers.text.items(), *layers.text_2.items()]
    for i, place in enumerate(place for name, place in named if name.endswith(parts)):
        shape, rank = layers.shapes[place.weight], ranks[i % len(ranks)]
        u, v = torch.randn(shape[0], rank), torch.randn(rank, *shape[1:])
        v *= 0.3 / (rank * shape[1:].numel()) ** 0.5
        low_rank[place.weight] = LowRank(u.half(), v.half())
    return dataclasses.replace(concept_of(model), keys_values={}, low_rank=low_rank)


def pipeline_of(model, folder):
    """diffusers' pipeline from a folder that we write of a model."""
    write_folder(model.state_dict(), model.config, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_noise(model):
    return torch.randn(1, *model.latent_shape(model.config.image_size, model.config.image_size))


@torch.no_grad()
def our_latents(model, concept, noise, steps=3, scale=8.0):
    """Sample plainly with a model that has the concept."""
    parsed = parse_prompt(PROMPT, concept.names)
    contexts = BranchContexts.of(model, concept, [parsed])
    options = sampling_options(model, steps=steps, scale=scale, eta=0.0, solver="ddim")
    return sample_latents(model, contexts, None, None, options, (lambda: noise, None))


def their_latents(pipe, prompt, noise, steps=3, scale=8.0):
    return pipe(prompt, latents=noise, num_inference_steps=steps, guidance_scale=scale, output_type="latent").images


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
