"""The toy world and the training of the embedded model's parts, with made-up sprites."""

import dataclasses
import re
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm import config as configuration
from ldm.checkpoint import load_model, save_weights
from ldm.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.pretraining import cache
from ldm.pretraining.artwork import COLOURS, HELD_OUT, NOUNS, Artwork, colourise, load_artwork
from ldm.pretraining.concepts import CONCEPTS, NOTO_CONCEPTS, STUDY_CONCEPTS, render_concept
from ldm.pretraining.config import PretrainConfig, WorldConfig
from ldm.pretraining.diffusion import CaptionTable, DiffusionPretraining, LatentDataset, TextToImage
from ldm.pretraining.latents import encoded_world, encoder_digest, latent_scale
from ldm.pretraining.loop import fit, restore
from ldm.pretraining.run import ImageDataset, save_diffusion
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.vae import VAEPretraining
from ldm.pretraining.world import SIZES, all_prompts, paste, preview, render


@pytest.fixture(scope="module")
def artwork():
    rng = np.random.default_rng(0)

    def sprite():
        pixels = rng.integers(0, 255, (128, 100, 4), dtype=np.uint8)
        return Image.fromarray(pixels, "RGBA")

    return Artwork({noun: [sprite(), sprite()] for noun in NOUNS})


def test_an_image_depends_on_its_seed_and_number_alone(artwork):
    first = [render(artwork, 3, i) for i in range(8)]
    again = [render(artwork, 3, i) for i in reversed(range(8))][::-1]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert a.caption == b.caption
    assert not np.array_equal(np.asarray(first[0].image), np.asarray(render(artwork, 4, 0).image))


@pytest.mark.slow
def test_captions_say_what_is_seen(artwork):
    seen = [render(artwork, 0, i) for i in range(700)]
    for item in seen:
        assert item.image.size == (64, 64)
        assert item.noun is None or re.search(rf"\b{item.noun}\b", item.caption)
        assert item.place is None or any(phrase in item.caption for phrase in PLACES[item.place][1])
        assert not re.search(r"\ba [aeiou]", item.caption), item.caption
        assert not re.search(r"\ban [^aeiou]", item.caption), item.caption
    assert {item.noun for item in seen} == {*NOUNS, None}
    assert {item.place for item in seen} == {*PLACES, None}
    assert any(f"{colour} " in item.caption for item in seen for colour in COLOURS)
    assert any(f"{size} " in item.caption for item in seen for size in SIZES)
    pairs = [item for item in seen if item.second]
    assert 0.05 < len(pairs) / len(seen) < 0.15
    assert all(item.caption.index(item.noun) <= item.caption.index(item.second) for item in pairs)


def test_colourised_sprites_have_the_colour():
    grey = Image.fromarray(
        np.dstack([np.tile(np.arange(0, 250, 10), (25, 1))] * 3 + [np.full((25, 25), 255)]).astype(np.uint8)
    )
    for colour in ("red", "green", "blue"):
        mean = np.asarray(colourise(grey, COLOURS[colour]))[..., :3].mean(axis=(0, 1))
        assert mean.argmax() == ("red", "green", "blue").index(colour)


def test_prompts_of_the_sheet_cover_the_world():
    prompts = all_prompts(128)
    assert len(set(prompts)) == 128
    assert all(sum(f" {noun} " in p for p in prompts) == 2 for noun in NOUNS)
    assert all(sum(p.endswith(phrases[0]) for p in prompts) == 8 for _, phrases in PLACES.values())


def test_the_world_is_rich_enough():
    assert len(NOUNS) >= 60 and len(PLACES) >= 14
    assert len(set(NOUNS.values())) == len(NOUNS)
    assert len(HELD_OUT) >= 8
    assert not {code for _, code in HELD_OUT.values()} & set(NOUNS.values())
    assert {noun for noun, _ in HELD_OUT.values()} <= set(NOUNS)


def test_sizes_and_sides_of_subjects(artwork):
    """A pasted sprite's extent follows the size asked for, and it stands where it is told."""

    def extent(size, x_range):
        image = Image.new("RGB", (128, 128), "white")
        disc = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(disc).ellipse([0, 0, 127, 127], fill=(0, 0, 255, 255))
        paste(image, disc, np.random.default_rng(0), size, x_range)
        pixels = np.asarray(image).astype(int)
        columns = np.flatnonzero((pixels[..., 2] - pixels[..., 0] > 100).any(axis=0))
        return columns[0], columns[-1] + 1

    for words in SIZES.values():
        left, right = extent(words, (0.25, 0.75))
        assert words[0] * 128 - 3 < right - left < words[1] * 128 + 3
    assert extent((0.4, 0.4), (0.0, 0.0))[1] < 70 < extent((0.4, 0.4), (1.0, 1.0))[1]
    assert extent((0.4, 0.4), (1.0, 1.0))[0] > 58


def test_rendered_images_come_from_the_cache(tmp_path, artwork, monkeypatch):
    """The cached images are those that `render` draws, with their labels; a second call draws nothing."""
    monkeypatch.setattr(cache, "load_artwork", lambda folder, wide: artwork)
    monkeypatch.setattr(cache.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
    config = WorldConfig(seed=5, images=30)
    world = cache.rendered_world(config, tmp_path, tmp_path)
    for i, item in enumerate(render(artwork, 5, i) for i in range(30)):
        assert np.array_equal(world.images[i], np.asarray(item.image))
        assert (world.captions[i], world.places[i]) == (item.caption, item.place)
        assert world.nouns[i] == (None if item.second else item.noun)
    monkeypatch.setattr(cache, "render", None)
    assert cache.rendered_world(config, tmp_path, tmp_path).captions == world.captions


def test_preview_is_a_sheet(artwork):
    assert preview(artwork, 0, 16).size[0] > 8 * 3 * 64


@pytest.mark.slow
def test_demo_concepts_are_rendered(artwork, tmp_path):
    dog, square = artwork.sprites["dog"][0], Image.new("RGBA", (64, 64), (255, 0, 255, 255))
    for part, extension, sprite in (("fluent/assets", "webp", dog), ("noto/img/google/64", "png", square)):
        (tmp_path / part).mkdir(parents=True)
        for code in {**NOUNS, **{key: code for key, (_, code) in HELD_OUT.items()}}.values():
            sprite.save(tmp_path / part / f"{code}.{extension}")
    for concepts, from_noto in ((CONCEPTS | STUDY_CONCEPTS, False), (NOTO_CONCEPTS, True)):
        assert len(concepts) >= 12
        for concept in concepts.values():
            images = render_concept(tmp_path, concept, seed=0)
            assert len(images) == 5
            assert len({p.tobytes() for p in images}) == 5
            pixels = np.stack(images).astype(int)  # a scene's light tints the magenta
            magenta = (pixels[..., [0, 2]].min(-1) - pixels[..., 1] > 100).sum((1, 2))
            assert (magenta.min() > 300) if from_noto else (magenta.max() < 300)
    # The nouns of held-out drawings are the ones that they are held out for.
    assert all(c.noun == HELD_OUT[c.held_out][0] for c in STUDY_CONCEPTS.values())


def test_missing_artwork(tmp_path):
    with pytest.raises(UserError, match="fetch_artwork.sh"):
        load_artwork(tmp_path)


SMALL = ModelConfig(
    name="small",
    image_size=32,
    unet=UNetConfig(
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=[1, 2],
        channel_mult=[1, 2],
        num_heads=2,
        context_dim=32,
    ),
    autoencoder=AutoencoderConfig(ch=8, ch_mult=[1, 2, 2], num_res_blocks=1, num_groups=4),
    text_encoder=TextEncoderConfig(width=32, layers=1, heads=2, mlp_width=64),
)
OPTIONS = PretrainConfig(
    batch_size=4, warmup=2, precision="32-true", accelerator="cpu", checkpoint_every=2, full_context_from=0.5
)


@pytest.mark.slow
def test_autoencoder_learns_and_resumes(tmp_path):
    images = np.zeros((8, 32, 32, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None] * 30

    def train(steps, folder):
        torch.manual_seed(0)
        model = LatentDiffusion(SMALL)
        module = VAEPretraining(model.autoencoder, dataclasses.replace(OPTIONS, steps=steps, learning_rate=3e-3))
        fit(module, ImageDataset(images), folder)
        return module

    def error(module):
        module.eval()
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            return (module.network.decode(module.network.encode(x).mean) - x).square().mean().item()

    short, long = train(2, tmp_path), train(40, tmp_path)  # the second goes on from the first's checkpoint
    assert long.trainer.global_step == 40
    assert error(long) < 0.3 * error(short)
    restored = VAEPretraining(LatentDiffusion(SMALL).autoencoder, OPTIONS)
    restore(restored, None, tmp_path)
    assert error(restored) == pytest.approx(error(long))
    with pytest.raises(UserError, match="train first"):
        restore(restored, None, tmp_path / "elsewhere")

    moments = encoded_world(long.network, images, tmp_path / "latents.pt", torch.device("cpu"))
    assert torch.equal(encoded_world(None, None, tmp_path / "latents.pt", None), moments)
    mean, logvar = moments.float().chunk(2, dim=1)
    scaled = latent_scale(moments) * (mean + (0.5 * logvar).exp() * torch.randn(200, *mean.shape)).flatten()
    assert scaled.std().item() == pytest.approx(1, abs=0.05)


def test_latents_belong_to_their_encoder():
    autoencoder = LatentDiffusion(SMALL).autoencoder
    known = encoder_digest(autoencoder)
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.add_(1)
        for parameter in autoencoder.parameters():
            parameter.copy_(parameter.half())  # as it comes back from disk
        assert encoder_digest(autoencoder) == known
        autoencoder.quant_conv.bias.add_(1)
    assert encoder_digest(autoencoder) != known


@pytest.mark.slow
def test_trained_weights_load_as_a_model(tmp_path):
    """UNet, text transformer and the trained token rows come back from the files as they were."""
    torch.manual_seed(0)
    model = LatentDiffusion(SMALL)
    captions = CaptionTable(["a dog on the beach", "a cat"] * 8)
    network = TextToImage(model, captions.token_ids)
    config = dataclasses.replace(OPTIONS, part="diffusion", steps=4)
    module = DiffusionPretraining(network, captions, model, config)
    fit(module, LatentDataset(torch.randn(16, 8, 8, 8).half(), captions), tmp_path / "run")
    trained = module.average.module
    save_diffusion(trained, captions.token_ids, tmp_path / "weights")
    vae = {f"first_stage_model.{name}": tensor for name, tensor in model.autoencoder.state_dict().items()}
    save_weights(vae, tmp_path / "weights" / "vae.safetensors")
    configuration.save(SMALL, tmp_path / "small.yaml")
    loaded = load_model(tmp_path / "small.yaml", tmp_path / "weights")

    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        expected = trained(x, t, captions.rows[captions.of_image[:1]])
        found = loaded.predict(x, t, loaded.text_encoder(["a dog on the beach"]))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # fp16 on disk
    table = loaded.text_encoder.token_table
    assert table.shape == (49408, 32)
    torch.testing.assert_close(table[captions.token_ids], trained.rows.detach(), rtol=2e-3, atol=2e-3)
    assert table[42170].std().item() == pytest.approx(0.02, rel=0.4)
