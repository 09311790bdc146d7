"""The networks against diffusers and transformers, with the same random weights mapped over."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from helpers import ROOT, mostly_slow
from tiny_models import diffusers_unet, diffusers_vae
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.autoencoder import AutoencoderKL
from ldm.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.text_encoder import CLIPTextEncoder
from ldm.unet import UNet

KEYS = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}


def clip_text_model(config):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            hidden_act=config.hidden_act,
        )
    )


def scramble(module):
    """Random weights everywhere, also where the initialisation is zero or one; in double precision."""
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.3)
    return module.eval()


def prefixed(module, prefix):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


UNETS = {
    "tiny": UNetConfig(
        model_channels=64,
        num_res_blocks=1,
        attention_resolutions=[1, 2, 4],
        channel_mult=[1, 2, 2.5],
        num_heads=4,
        context_dim=128,
    ),
    "small SD": UNetConfig(model_channels=32, context_dim=48, num_heads=2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow(UNETS, "tiny"))
def test_unet_equals_diffusers(name):
    config = UNETS[name]
    ours = scramble(UNet(config))
    theirs = diffusers_unet(config, 16)().double().eval()
    theirs.load_state_dict(convert_ldm_unet_checkpoint(prefixed(ours, KEYS["unet"]), theirs.config))
    t = torch.tensor([3, 871])
    x = torch.randn(2, 4, 16, 16).double()
    context = torch.randn(2, 77, config.context_dim).double()
    assert relative_error(ours(x, t, context), theirs(x, t, context).sample) < 1e-6


VAES = {
    "tiny": AutoencoderConfig(ch=16, ch_mult=[1, 2, 4], num_res_blocks=1, num_groups=8),
    "small SD": AutoencoderConfig(ch=32),
}


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow(VAES, "tiny"))
def test_autoencoder_equals_diffusers(name):
    config = VAES[name]
    ours = scramble(AutoencoderKL(config))
    theirs = diffusers_vae(config)().double().eval()
    theirs.load_state_dict(convert_ldm_vae_checkpoint(prefixed(ours, KEYS["vae"]), theirs.config))
    images = torch.rand(2, 3, 64, 64).double() * 2 - 1
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert relative_error(posterior.mean, expected.mean) < 1e-6
    assert relative_error(posterior.logvar, expected.logvar) < 1e-6
    torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-6, atol=1e-6)
    z = torch.randn_like(posterior.mean)
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-6


@pytest.fixture
def double():
    """New tensors are fp64: transformers 4.48 makes its mask in that precision, whatever its weights have."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_text_encoder_equals_transformers(double):
    config = TextEncoderConfig(width=64, layers=3, heads=4, mlp_width=128)
    ours = scramble(CLIPTextEncoder(config))
    theirs = clip_text_model(config).double().eval()
    source = ours.transformer.text_model.state_dict()
    wrapped = any(name.startswith("text_model.") for name in theirs.state_dict())
    theirs.load_state_dict({("text_model." if wrapped else "") + n: p for n, p in source.items()})
    ids = ours.tokenize(["a photo of a dog on the beach", "", "quick brown foxes, jumping!"])
    assert relative_error(ours.encode(ours.embed(ids)), theirs(ids).last_hidden_state) < 1e-6


def test_full_sd_v1_has_the_names_and_shapes_of_diffusers_models():
    """Every key of an SD v1 checkpoint, through diffusers' own converter, is a key of diffusers' models."""
    with torch.device("meta"):
        model = LatentDiffusion(ModelConfig())
        theirs = {"unet": diffusers_unet(ModelConfig().unet, 64)(), "vae": diffusers_vae(ModelConfig().autoencoder)()}
    for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        expected = {name: tuple(tensor.shape) for name, tensor in theirs[part].state_dict().items()}
        state = {n: t for n, t in model.state_dict().items() if n.startswith(KEYS[part])}
        converted = {name: tuple(tensor.shape) for name, tensor in convert(state, theirs[part].config).items()}
        # SD stores the VAE's attention projections as 1x1 convolutions.
        assert {n: s[:2] for n, s in converted.items() if "attentions" in n} == {
            n: s[:2] for n, s in expected.items() if "attentions" in n
        }
        assert converted.keys() == expected.keys()
        assert all(converted[n] == expected[n] for n in expected if "attentions" not in n)


@pytest.mark.slow
def test_full_sd_v1_equals_the_checked_in_list():
    """Names, shapes and sizes of the contract: tests/data/sd-v1-keys.txt."""
    with torch.device("meta"):
        model = LatentDiffusion(ModelConfig())
    ours = [f"{name} {list(tensor.shape)}" for name, tensor in model.state_dict().items()]
    listed = (ROOT / "tests/data/sd-v1-keys.txt").read_text().splitlines()
    assert sorted(name for name in ours if "position_ids" not in name) == sorted(listed)

    def size(module):
        return sum(p.numel() for p in module.parameters())

    assert len(model.unet.state_dict()) == 686
    assert size(model.unet) == 859_520_964
    assert size(model.autoencoder) == 83_653_863
    assert size(model.text_encoder) == 123_060_480


def test_a_long_prompt_is_cut_with_a_warning():
    encoder = CLIPTextEncoder(TextEncoderConfig(width=64, layers=1, heads=4, mlp_width=128))
    with pytest.warns(UserWarning, match="has 80 tokens, 75 fit; cut off: 'dog in times square .'"):
        ids = encoder.tokenize(["very " * 75 + "dog in times square."])
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 49407
