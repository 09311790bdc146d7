"""Encoders of three libraries with random weights, saved as users have them, against direct computations."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, ViTConfig, ViTImageProcessor, ViTModel

from dci.encoders import load_encoder
from dci.evaluation import load_encoders
from dci.features import FeatureStore
from ldm.errors import UserError
from ldm.judges import load_clip, load_instance_encoder

TEXTS = ["photo of a cat", "a red car, on the beach", "a very long text " * 40]
WIDTH, LAYERS = 64, 2
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": LAYERS, "width": WIDTH, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
}


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def their_open_clip():
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CLIP).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def open_clip_folder(their_open_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    torch.save(their_open_clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def transformers_folder(their_open_clip, tmp_path_factory):
    """transformers' CLIP with open_clip's weights."""
    folder = tmp_path_factory.mktemp("transformers")
    part = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
            "hidden_act": "gelu"}  # fmt: skip
    config = CLIPConfig(
        text_config={**part, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        vision_config={**part, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    model = CLIPModel(config)
    model.load_state_dict(renamed(their_open_clip.state_dict(), model))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    words = open_clip.tokenizer.SimpleTokenizer()
    vocabulary = dict(words.encoder) | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    del vocabulary["<start_of_text>"], vocabulary["<end_of_text>"]
    CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks)).save_pretrained(folder)
    return folder


def renamed(state, model):
    """open_clip's state dict under transformers' names."""
    whole = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
    }
    for theirs, ours in (("text_model.final_layer_norm", "ln_final"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
                         ("vision_model.post_layernorm", "visual.ln_post")):  # fmt: skip
        whole |= {f"{theirs}.{end}": state[f"{ours}.{end}"] for end in ("weight", "bias")}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(LAYERS):
            block, own = f"{tower}.encoder.layers.{layer}", f"{prefix}.resblocks.{layer}"
            for end in ("weight", "bias"):
                whole |= {f"{block}.{theirs}.{end}": state[f"{own}.{ours}.{end}"] for theirs, ours in names.items()}
                parts = state[f"{own}.attn.in_proj_{end}"].chunk(3)
                whole |= {f"{block}.self_attn.{q}_proj.{end}": p for q, p in zip("qkv", parts, strict=True)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("position_ids")}
    return {**whole, **buffers}


@pytest.mark.parametrize("size", [(64, 64), (90, 130)])
def test_open_clip_and_transformers_give_the_same_features(open_clip_folder, transformers_folder, size):
    ours = load_encoder(f"open_clip:{open_clip_folder}")
    theirs = load_encoder(f"transformers:{transformers_folder}")
    # Both resize in their own arithmetic; where nothing is resized they must agree to rounding.
    tolerance = 1e-5 if size == (64, 64) else 2e-2
    a, b = (encoder.image_features([picture(*size), picture(*size, seed=1)]) for encoder in (ours, theirs))
    assert (a - b).norm() < tolerance * b.norm()
    a, b = (encoder.text_features(TEXTS) for encoder in (ours, theirs))
    assert (a - b).norm() < 1e-5 * b.norm()


def test_transformers_features_are_those_of_the_model_itself(transformers_folder):
    encoder = load_encoder(f"transformers:{transformers_folder}")
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(picture())
    tokens = open_clip.tokenizer.SimpleTokenizer()(TEXTS[:2], 77)
    with torch.inference_mode():
        vision = model.visual_projection(model.vision_model(pixels[None]).pooler_output)
        text = model.text_projection(model.text_model(tokens).pooler_output)
    torch.testing.assert_close(encoder.image_features([picture()]), vision, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.text_features(TEXTS[:2]), text, rtol=1e-5, atol=1e-5)


def test_open_clip_takes_a_files_weights(tmp_path):
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = load_encoder(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}")
    pixels = encoder.prepare(picture(224, 224))
    assert pixels.shape == (3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.image_features([picture(224, 224)]), model.encode_image(pixels[None]))


def test_dino_through_timm_is_prepared_as_published(tmp_path):
    """Resize to 256, crop 224, ImageNet's mean and deviation: what DINO, DreamBooth and Custom Diffusion do."""
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    encoder = load_encoder(f"timm:vit_small_patch16_224.dino/{tmp_path / 'dino.pth'}", "instance")
    published = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    wide = picture(320, 200)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.image_features([wide]), model(published(wide)[None]), rtol=1e-5, atol=1e-5)


def test_a_vit_of_transformers_gives_its_class_token(tmp_path):
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pixels = transforms.Normalize((0.5,) * 3, (0.5,) * 3)(transforms.ToTensor()(picture(32, 32)))
    encoder = load_encoder(f"transformers:{tmp_path}", "instance")
    with torch.inference_mode():
        expected = model(pixels[None]).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.image_features([picture(32, 32)]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="reads no texts"):
        encoder.text_features(["a"])
    with pytest.raises(UserError, match="reads no texts"):
        load_encoders(f"transformers:{tmp_path}")


def test_the_judges_are_encoders_up_to_length():
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 127.5 - 1
    for role, judge in (("clip", load_clip()), ("instance", load_instance_encoder())):
        found = load_encoder("tiny", role).image_features([picture()])
        with torch.inference_mode():
            expected = judge.image_features(pixels)
        torch.testing.assert_close(torch.nn.functional.normalize(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip", ["no encoder 'clip'", "transformers:FOLDER"]),
        ("timm:", ["no encoder 'timm:'"]),
        ("open_clip:ViT-B-32/openai", ["hub cannot be reached", "local folder", "open_clip:ARCHITECTURE/FILE"]),
        ("open_clip:ViT-B-32", ["names no weights", "openai"]),
        ("open_clip:ViT-B-32/missing.pt", ["missing.pt"]),
        ("timm:vit_small_patch16_224.dino", ["hub cannot be reached", "timm:NAME/FILE"]),
        ("timm:vit_small_patch16_224.dino/missing.pth", ["no file missing.pth"]),
        ("timm:not_a_model", ["not_a_model"]),
        ("transformers:openai/clip-vit-base-patch32", ["hub cannot be reached", "transformers:FOLDER"]),
        ("transformers:/no/such/folder", ["no folder /no/such/folder"]),
        ("inception:/no/such/file.pth", ["inception"]),
    ],
)
def test_an_encoder_out_of_reach_is_one_line(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_encoder(name)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_features_are_kept_by_content_and_weights(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "copy.png")
    picture(seed=1).save(tmp_path / "b.png")
    files, seen = [tmp_path / name for name in ("a.png", "copy.png", "b.png")], []
    encoder = load_encoder("tiny", "instance")
    first = FeatureStore(tmp_path / "cache.sqlite").features(encoder, files, batch_size=1)
    torch.testing.assert_close(first[0], first[1])
    object.__setattr__(encoder, "image", lambda pixels: seen.append(len(pixels)) or torch.zeros(len(pixels), 128))
    again = FeatureStore(tmp_path / "cache.sqlite").features(encoder, files[::-1])
    torch.testing.assert_close(again, first.flip(0))
    assert not seen
    encoder.module.trunk.attnpool.c_proj.bias.add_(1)  # other weights, other features
    FeatureStore(tmp_path / "cache.sqlite").features(encoder, files)
    assert seen == [2]  # the copy is not encoded by itself


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no database " * 100)
    with pytest.raises(UserError, match="notes.txt is not a cache"):
        FeatureStore(tmp_path / "notes.txt")


@pytest.mark.fullsize
def test_inception_is_that_of_torchmetrics(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, strict=True):
            return None

    torch.save({}, tmp_path / "none.pth")
    torch.save(Random("inception", ["2048"], str(tmp_path / "none.pth")).state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder(f"inception:{tmp_path / 'weights.pth'}")
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth"))
    expected = theirs(torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None])
    torch.testing.assert_close(encoder.image_features([picture()]), expected, rtol=1e-5, atol=1e-5)
