"""SDXL: counts of the full size on meta tensors, and its small shape against diffusers, transformers and open_clip."""

import copy

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionXLPipeline
from helpers import ROOT, mostly_slow
from safetensors.torch import save_file
from tiny_models import relative_error

from benchmarks.peers import diffusers_scheduler
from dci.pipeline import Pipeline
from ldm import tokenizer
from ldm.checkpoint import TOLERATED, load_model, read_config
from ldm.conditioning import ImageSize
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats import presets
from ldm.formats.recognise import recognise
from ldm.images import to_tensor
from ldm.noise import ImageNoise
from ldm.text_to_image import SamplingOptions, text_to_image

SIZE = ImageSize((40, 56), (3, 5), (32, 32))


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(2)
    return tiny_models.make(tiny_models.small_xl())


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    save_file(theirs.state, folder / "m.safetensors")
    return load_model(tiny_models.write_yaml(theirs.config, folder / "m.yaml"), folder / "m.safetensors")


def test_full_size_counts():
    with torch.device("meta"):
        model = LatentDiffusion(presets.sdxl())

    def size(module):
        return sum(p.numel() for p in module.parameters())

    assert (size(model.unet), len(model.unet.state_dict())) == (2_567_463_684, 1680)
    assert [size(encoder) for encoder in model.text_encoder.pair] == [123_060_480, 694_659_840]
    assert size(model.autoencoder) == 83_653_863
    matrices = [p for n, p in model.named_parameters() if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    assert (len(matrices), sum(p.numel() for p in matrices)) == (140, 340_787_200)
    assert sorted({tuple(p.shape) for p in matrices}) == [(640, 2048), (1280, 2048)]
    assert sum(p.shape[0] == 640 for p in matrices) == 20
    layers = model.unet.cross_layers()
    assert len(layers) == 70
    assert min(layer.factor for layer in layers) == 2  # 64 x 64 at 1024 px
    assert sum(layer.factor == 4 for layer in layers) == 60


@torch.no_grad()
def test_networks_equal_diffusers(theirs, ours):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([871, 3])
    context, pooled = torch.randn(2, 77, 96), torch.randn(2, 48)
    sizes = SIZE.row().expand(2, -1)
    vector = ours.text_encoder.vector(pooled, sizes)
    expected = theirs.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert relative_error(ours.unet(x, t, context, vector=vector), expected) < 1e-5


def ids_of(*prompts):
    return [tokenizer.frame(ids) for ids in prompts]


def transformers_pair(theirs, rows, extra):
    """Both contexts and the pooled text, learned tokens put into transformers' own token tables."""
    states = []
    for text, half, pad in ((theirs.text, extra[:, :32], tokenizer.END), (theirs.text_2, extra[:, 32:], 0)):
        table = text.get_input_embeddings().weight
        text.get_input_embeddings().weight = torch.nn.Parameter(torch.cat([table, half]), requires_grad=False)
        padded = [tiny_models.padded(row[1 : row.index(tokenizer.END)], pad) for row in rows]
        states.append(text(torch.tensor(padded), output_hidden_states=True))
        text.get_input_embeddings().weight = table
    context = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    return context, states[1].text_embeds


@torch.no_grad()
def test_both_encoders_equal_transformers_with_learned_tokens(theirs, ours):
    """The end is found by its id: learned tokens have larger ones."""
    dog, learned = tokenizer.tokenize("a photo of a dog"), [tokenizer.VOCAB_SIZE, tokenizer.VOCAB_SIZE + 1]
    rows, extra = ids_of([*dog[:4], *learned, dog[4]], learned, [], [*dog, *[dog[0]] * 80]), torch.randn(2, 96)
    text = ours.text_encoder
    context, vector = text.conditions(rows, extra, SIZE.row())
    expected, pooled = transformers_pair(theirs, rows, extra)
    assert relative_error(context, expected) < 1e-5
    assert relative_error(vector[:, :48], pooled) < 1e-5
    assert relative_error(text.condition(torch.tensor(rows), extra, SIZE.row()).vector, vector) < 1e-6
    assert relative_error(text.condition(torch.tensor(rows), extra, SIZE.row()).context, context) < 1e-6


@torch.no_grad()
def test_pooled_text_equals_open_clip(theirs, ours):
    prompts = [tokenizer.tokenize(prompt) for prompt in tiny_models.PROMPTS]
    vector = ours.text_encoder.condition(torch.tensor(ids_of(*prompts)), None, SIZE.row()).vector
    expected = theirs.open_clip(torch.tensor([tiny_models.padded(ids, 0) for ids in prompts]))
    assert relative_error(vector[:, :48], expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("negative", mostly_slow(["", "blurry"], "blurry"))
def test_a_trajectory_equals_diffusers(theirs, ours, negative):
    """Empty negative prompts are zeros, in context and pooled text; sizes and crop go to both halves."""
    options = SamplingOptions(4, 5.0, 0.0, 7, 32, 64, original_size=(40, 72), crop=(2, 4))
    scheduler = diffusers_scheduler()
    pipeline = StableDiffusionXLPipeline(theirs.vae, theirs.text, theirs.text_2, None, None, theirs.unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    rows = ids_of(tokenizer.tokenize("a dog on the beach"))
    context, pooled = transformers_pair(theirs, rows, torch.empty(0, 96))
    given = {}
    if negative:
        other, other_pooled = transformers_pair(theirs, ids_of(tokenizer.tokenize(negative)), torch.empty(0, 96))
        given = {"negative_prompt_embeds": other, "negative_pooled_prompt_embeds": other_pooled}
    latents = ImageNoise(7, [0], ours.latent_shape(32, 64))()
    expected = pipeline(
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        **given,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=5.0,
        height=32,
        width=64,
        original_size=(40, 72),
        crops_coords_top_left=(2, 4),
        target_size=(32, 64),
        output_type="pt",
    ).images
    pixels = text_to_image(ours, "a dog on the beach", [0], options, negative=negative)
    assert (pixels / 2 + 0.5 - expected).abs().max() < 1e-5
    settings = {field: getattr(options, field) for field in ("steps", "scale", "eta", "seed", "height", "width")}
    (image,) = Pipeline.of(ours)("a dog on the beach", negative=negative, **settings, original_size=(40, 72), crop=(2, 4))
    assert (to_tensor(image) / 2 + 0.5 - expected[0]).abs().max() < 1 / 255
    (other,) = Pipeline.of(ours)("a dog on the beach", negative=negative, **settings)
    assert (to_tensor(other) - to_tensor(image)).abs().max() > 1 / 255  # the size of the image itself, nothing cut off


def test_sizes_condition_no_other_family(tiny_base):
    with pytest.raises(UserError, match="has no condition on an image's size"):
        text_to_image(tiny_base, "a dog", [0], SamplingOptions(2, height=64, width=64, crop=(0, 0)))


@pytest.mark.parametrize("value", [(0, 1), (1,), (1.5, 2), "12"])
def test_sizes_that_are_none(ours, value):
    with pytest.raises(UserError, match="original_size .* expected two whole numbers from 1 on"):
        text_to_image(ours, "a dog", [0], SamplingOptions(2, height=32, width=32, original_size=value))


def test_the_autoencoder_is_not_left_in_fp16(ours):
    half = copy.deepcopy(ours).half()
    assert (half.dtype, half.vae_dtype) == (torch.float16, torch.float32)
    assert copy.deepcopy(ours).bfloat16().vae_dtype == torch.bfloat16


def separate(theirs, folder, upcast):
    """An autoencoder in a folder of its own, whose activations no fp16 holds."""
    vae = copy.deepcopy(theirs.vae)
    vae.decoder.conv_in.bias.data += 1e5
    vae.register_to_config(force_upcast=upcast)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("said", mostly_slow([True, False, None], None))
@pytest.mark.parametrize("whole", mostly_slow([True, False], False), ids=["folder", "file"])
def test_a_separate_autoencoder_is_in_fp16_only_where_its_own_configuration_says_so(theirs, ours, said, whole, tmp_path):
    folder = separate(theirs, tmp_path / "vae", bool(said))
    if said is None:
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file(theirs.state, tmp_path / "m.safetensors")
    files = (tiny_models.write_yaml(theirs.config, tmp_path / "m.yaml"), tmp_path / "m.safetensors")
    vae = folder if whole else folder / "diffusion_pytorch_model.safetensors"
    half = load_model(*files, dtype=torch.float16, vae=vae)
    allowed = said is False
    assert (half.dtype, half.vae_dtype) == (torch.float16, torch.float16 if allowed else torch.float32)
    assert half.to("cpu").half().vae_dtype == half.vae_dtype
    assert load_model(*files, dtype=torch.bfloat16, vae=vae).vae_dtype == torch.bfloat16
    if not allowed:  # what overflows in fp16 is decoded as in fp32
        latents = torch.randn(1, 4, 16, 16)
        exact = load_model(*files, vae=vae).decode(latents.half().float())
        assert exact.isfinite().all()
        torch.testing.assert_close(half.decode(latents.half()).float(), exact, atol=1e-3, rtol=1e-3)


def skeleton(config):
    """A state dict of a shape, without values."""
    with torch.device("meta"):
        return LatentDiffusion(config).state_dict()


def test_a_single_file_is_recognised_and_every_key_accounted_for():
    """What the published file has besides: open_clip's scale, transformers' position ids, and the noise levels."""
    state = skeleton(presets.sdxl())
    assert recognise(state, "x", None) == presets.sdxl()
    assert {"conditioner.embedders.1.model.logit_scale", "denoiser.sigmas"} <= TOLERATED
    assert {name.split(".")[0] for name in state} == {"model", "first_stage_model", "conditioner"}


def test_the_refiner_is_refused_by_name(tmp_path):

    state = {n.replace("embedders.1.", "embedders.0."): t for n, t in skeleton(tiny_models.small_xl()).items()}
    with pytest.raises(UserError, match="holds the SDXL refiner"):
        recognise(state, "x", None)
    text = (ROOT / "tests/data/official/sd_xl_base.yaml").read_text()
    first, second = text.index("        - is_trainable"), text.index("        - is_trainable", text.index("layer_idx"))
    (tmp_path / "refiner.yaml").write_text(text[:first] + text[second:])
    with pytest.raises(UserError, match="is the SDXL refiner"):
        read_config(tmp_path / "refiner.yaml")


CHANGES = {
    "emb_models.0..params.layer_idx=12: expected 11": ("layer_idx: 11", "layer_idx: 12"),
    "emb_models.4..params.outdim=128: expected 256": ("outdim: 256}\n    first", "outdim: 128}\n    first"),
    "unknown key 'model.params.sampler'": ("    network_config:", "    sampler: 1\n    network_config:"),
    "attn_type=linear: expected vanilla": ("vanilla-xformers", "linear"),
    "expected sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling or": ("EpsScaling", "EDMScaling"),
    "num_classes=None: expected sequential": ("num_classes: sequential", "num_classes: null"),
    "unet.transformer_depth=.1, 2.: expected a whole number, or a list of 3": ("[1, 2, 10]", "[1, 2]"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_the_official_file_says_otherwise_is_an_error(message, tmp_path):

    old, new = CHANGES[message]
    text = (ROOT / "tests/data/official/sd_xl_base.yaml").read_text()
    assert old in text
    (tmp_path / "c.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "c.yaml")
