"""Models with random weights, as diffusers, transformers and open_clip make and save them, at any size."""

import copy
import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from open_clip.transformer import TextTransformer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.peers import (
    ROOT,
    diffusers_scheduler,
    diffusers_unet,
    diffusers_vae,
    empty,
    random_weight,
    transformers_text,
)
from ldm import config as configuration
from ldm import tokenizer
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.formats import presets

PROMPTS = ["a photo of a dog on the beach", ""]
SIZE_WIDTH = 16  # of the sinusoids of an image's size, in the small SDXL
SMALL = 2**20  # numbers of a weight that may be kept in two precisions
SMALL_VAE = AutoencoderConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1)


def small_v1():
    unet = UNetConfig(
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=[2, 1],
        channel_mult=[1, 2, 2],
        num_heads=2,
        context_dim=64,
    )
    text = TextEncoderConfig(width=64, layers=3, heads=4, mlp_width=128)
    return ModelConfig(
        name="sd-v1", image_size=32, unet=unet, autoencoder=SMALL_VAE, text_encoder=text, sampling=presets.sampling()
    )


def small_v2():
    unet = UNetConfig(
        model_channels=32,
        num_res_blocks=2,
        attention_resolutions=[2, 1],
        channel_mult=[1, 2, 2],
        num_head_channels=16,
        use_linear_in_transformer=True,
        context_dim=64,
    )
    text = TextEncoderConfig(kind="openclip", width=64, layers=2, heads=4, mlp_width=256, hidden_act="gelu")
    return ModelConfig(
        name="sd-v2-v",
        image_size=32,
        unet=unet,
        autoencoder=SMALL_VAE,
        text_encoder=text,
        schedule=ScheduleConfig(parameterization="v"),
        sampling=presets.sampling(),
    )


def small_xl():
    """SDXL's shape: no attention at full resolution, deeper below, two text encoders, a vector of the image's size."""
    config = configuration.load(ModelConfig, ROOT / "configs/model/tiny-sdxl.yaml")
    return dataclasses.replace(config, name="sdxl", sampling=presets.sampling())


def random_state(config):
    """A state dict of random weights under SD's names, without any library's help."""
    with torch.device("meta"):
        keys = LatentDiffusion(config).state_dict()
    return {name: random_weight(key.shape) for name, key in keys.items()}


def mapped_weights(network, file):
    """Random weights of a network in fp16, in a file that is mapped into memory and takes none.

    They are cut out of one long row of numbers at random places: billions of new ones would take minutes.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    sizes = [shape.numel() for shape in shapes.values()]
    whole, state = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=torch.float16), {}
    row = torch.randn(2**23)
    for (name, shape), part in zip(shapes.items(), whole.split(sizes), strict=True):
        state[name] = part.view(shape)
        if len(shape) < 2:
            state[name].copy_(random_weight(shape))
            continue
        scaled = 0.5 * shape[1:].numel() ** -0.5 * row.roll(int(torch.randint(len(row), ())))
        for piece in part.split(len(row)):
            piece.copy_(scaled[: len(piece)])
    return state


@contextmanager
def computing_in(network, dtype):
    """Let a network compute in another precision than its weights': a module has them in it while it runs.

    With its own go those of its innermost parts, whose weights it may use by itself.
    """
    stored = {parameter: parameter.data for parameter in network.parameters()}
    hooks = []

    def parameters_of(module):
        parts = [module, *(part for part in module.children() if not [*part.children()])]
        return [parameter for part in parts for parameter in part.parameters(recurse=False)]

    def cast(module, *_):
        for parameter in parameters_of(module):
            parameter.data = parameter.data.to(dtype)

    def put_back(module, *_):
        for parameter in parameters_of(module):
            parameter.data = parameter.data if parameter.numel() < SMALL else stored[parameter]

    for module in network.modules():
        hooks += [module.register_forward_pre_hook(cast), module.register_forward_hook(put_back)]
    for parameter in network.parameters():
        if parameter.numel() < SMALL:  # networks look at the precision of their smaller parts
            parameter.data = parameter.data.to(dtype)
    try:
        yield network
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in stored.items():
            parameter.data = data


def randomized(module):
    module = module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(random_weight(parameter.shape))
    return module


@dataclasses.dataclass
class Theirs:
    """The three networks, each of the library that Stable Diffusion's users know it from."""

    config: ModelConfig
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    open_clip: TextTransformer | None  # SD 2.x: the same weights as text's, and one layer more
    state: dict  # all of it under SD's names
    text_2: CLIPTextModelWithProjection | None = None  # SDXL: the same weights as open_clip's

    def context(self):
        """The text context of PROMPTS, with each library's own way to get there."""
        if self.text_2 is not None:
            return torch.cat([self._hidden(self.text, tokenizer.END), self._hidden(self.text_2, 0)], dim=-1)
        if self.open_clip is None:
            return self.text(torch.tensor([tokenizer.frame(tokenizer.tokenize(p)) for p in PROMPTS])).last_hidden_state
        ids = open_clip.tokenizer.SimpleTokenizer()(PROMPTS, 77)
        layers = len(self.open_clip.transformer.resblocks)
        features = self.open_clip.forward_intermediates(
            ids, indices=[layers - 2], normalize_intermediates=True, output_fmt="NLC", intermediates_only=True
        )
        context = features["text_intermediates"][0]
        assert relative_error(self.text(ids).last_hidden_state, context) < 1e-5  # the two libraries agree
        return context

    def _hidden(self, text, pad):
        ids = torch.tensor([padded(tokenizer.tokenize(prompt), pad) for prompt in PROMPTS])
        return text(ids, output_hidden_states=True).hidden_states[-2]


def padded(ids, pad, length=77):
    """A row of token ids between start and end, padded with any token."""
    row = [tokenizer.START, *ids[: length - 2], tokenizer.END]
    return row + [pad] * (length - len(row))


def make(config):
    """Build a model of a configuration: one random state dict under SD's names, converted by diffusers itself."""
    with torch.device("meta"):
        keys = LatentDiffusion(config).state_dict()
    state = {n: random_weight(key.shape) for n, key in keys.items() if n.startswith(("model.", "first_stage_model."))}
    pooled = config.text_encoder_2.projection if config.text_encoder_2 else 0
    size_width = ((config.unet.adm_in_channels or 0) - pooled) // 6
    unet = empty(diffusers_unet(config.unet, config.image_size // config.autoencoder.downsampling, size_width))
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(state), unet.config), assign=True)
    vae = empty(diffusers_vae(config.autoencoder))
    vae.register_to_config(scaling_factor=config.latent_scale)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(state), vae.config), assign=True)
    networks = (unet.eval().requires_grad_(False), vae.eval().requires_grad_(False))
    if config.text_encoder_2 is None:
        text, clip, entries = text_models(config.text_encoder)
        return Theirs(config, *networks, text, clip, state | entries)
    text, _, first = text_models(config.text_encoder, "conditioner.embedders.0.")
    text_2, clip, second = text_models(config.text_encoder_2, "conditioner.embedders.1.")
    return Theirs(config, *networks, text, clip, state | first | second, text_2)


def text_models(config, place="cond_stage_model."):
    """(transformers' model, open_clip's or None, entries of SD's state dict)."""
    text = transformers_text(config)
    wrapped = any(name.startswith("text_model.") for name in text.state_dict())
    if config.kind == "clip":
        prefix = place + "transformer." + ("" if wrapped else "text_model.")
        return randomized(text), None, {prefix + n: t for n, t in text.state_dict().items()}
    clip = TextTransformer(
        width=config.width,
        heads=config.heads,
        layers=config.layers + (0 if config.projection else 1),  # which pooling alone needs
        mlp_ratio=config.mlp_width / config.width,
        output_dim=config.projection or config.width,
    )
    randomized(clip)
    prefix = place + "model."
    entries = {prefix + n: t for n, t in clip.state_dict().items()}
    entries[prefix + "logit_scale"] = torch.tensor(4.6)
    used = {n: t for n, t in entries.items() if f".resblocks.{config.layers}." not in n}
    used = used if config.projection else {n: t for n, t in used.items() if "text_projection" not in n}
    converted = convert_open_clip_checkpoint(text, used, prefix)
    converted = {n if wrapped else n.removeprefix("text_model."): t for n, t in converted.items()}
    text.load_state_dict(converted)
    return text.eval().requires_grad_(False), clip, entries


def save_folder(theirs, folder, variant=None, shard="10GB", safe=True):
    """Save a diffusers folder with the libraries' own save_pretrained; variant fp16 halves a copy."""
    xl = theirs.text_2 is not None
    v2 = theirs.open_clip is not None and not xl
    parts = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text}
    if xl:
        parts["text_encoder_2"] = theirs.text_2
    for name, part in parts.items():
        if variant == "fp16":
            part = copy.deepcopy(part).half()
        options = {} if safe else {"safe_serialization": False}
        part.save_pretrained(folder / name, variant=variant, max_shard_size=shard, **options)
    kind = "v_prediction" if theirs.config.schedule.parameterization == "v" else "epsilon"
    scheduler = diffusers_scheduler(prediction_type=kind)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    tokens = {"pad_token": "!" if v2 else "<|endoftext|>"}
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps(tokens))
    if xl:
        (folder / "tokenizer_2").mkdir()
        (folder / "tokenizer_2/special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def published_extras(state):
    """A training checkpoint's state dict as the published files are: with the schedule and position ids."""
    names = (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "posterior_mean_coef1",
        "model_ema.num_updates",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    )
    return {**state, **{name: torch.zeros(4) for name in names}}


class Expected:
    """What their networks compute for fixed inputs; kept, so that the networks themselves need not be."""

    @torch.no_grad()
    def __init__(self, theirs, side):
        unet = theirs.config.unet
        self.x, self.t = torch.randn(1, 4, side, side), torch.tensor([871])
        self.text = torch.randn(1, 77, unet.context_dim)
        factor = theirs.config.autoencoder.downsampling
        self.image = torch.rand(1, 3, factor * side, factor * side) * 2 - 1
        self.vector, more = None, {}
        if theirs.text_2 is not None:
            pooled, sizes = torch.randn(1, theirs.config.text_encoder_2.projection), torch.tensor([[64.0, 32, 1, 2, 16, 8]])
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
            self.vector = torch.cat([pooled, theirs.unet.add_time_proj(sizes.flatten()).view(1, -1)], dim=-1)
        self.noise = theirs.unet(self.x, self.t, self.text, **more).sample
        self.moments = theirs.vae.encode(self.image).latent_dist
        self.decoded = theirs.vae.decode(self.x).sample
        self.context = theirs.context()

    @torch.no_grad()
    def errors(self, model):
        """Relative error of each network: {name: error}."""
        posterior = model.autoencoder.encode(self.image)
        return {
            "unet": relative_error(model.unet(self.x, self.t, self.text, vector=self.vector), self.noise),
            "vae mean": relative_error(posterior.mean, self.moments.mean),
            "vae logvar": relative_error(posterior.logvar, self.moments.logvar),
            "vae decode": relative_error(model.autoencoder.decode(self.x), self.decoded),
            "text": relative_error(model.text_encoder(PROMPTS), self.context),
        }


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def write_yaml(config, file: Path) -> Path:
    from ldm import config as configuration

    configuration.save(config, file)
    return file
