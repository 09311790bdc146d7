"""Encoders of three libraries with random weights, saved as users have them, against direct computations."""

import copy
import json
import logging
import shutil
import sys
import warnings

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers import mostly_slow
from PIL import Image
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, ViTConfig, ViTImageProcessor, ViTModel

from dci.evaluation.encoders import check_encoder, load_encoder
from dci.evaluation.evaluate import check_encoders, load_encoders
from dci.evaluation.feature_cache import FeatureStore
from ldm.embedded_encoders import load_clip, load_instance_encoder
from ldm.errors import UserError

TEXTS = ["photo of a cat", "a red car, on the beach", "a very long text " * 40]
WIDTH, LAYERS = 64, 2
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": LAYERS, "width": WIDTH, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
}


def image(width=64, height=64, seed=0):
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
    part = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
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
    (folder / "vocab.json").write_text(json.dumps(vocabulary))  # older releases of transformers make one of files alone
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in words.bpe_ranks)]))
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
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
    for theirs, ours in (
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
    ):
        whole |= {f"{theirs}.{end}": state[f"{ours}.{end}"] for end in ("weight", "bias")}
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(LAYERS):
            block, own = f"{tower}.encoder.layers.{layer}", f"{prefix}.resblocks.{layer}"
            for end in ("weight", "bias"):
                whole |= {f"{block}.{theirs}.{end}": state[f"{own}.{ours}.{end}"] for theirs, ours in names.items()}
                parts = state[f"{own}.attn.in_proj_{end}"].chunk(3)
                whole |= {f"{block}.self_attn.{q}_proj.{end}": p for q, p in zip("qkv", parts, strict=True)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("position_ids")}
    return {**whole, **buffers}


@pytest.mark.parametrize("size", [(64, 64), pytest.param((90, 130), marks=pytest.mark.slow)])
def test_open_clip_and_transformers_give_the_same_features(open_clip_folder, transformers_folder, size):
    ours = load_encoder(f"open_clip:{open_clip_folder}")
    theirs = load_encoder(f"transformers:{transformers_folder}")
    # Both resize in their own arithmetic; where nothing is resized they must agree to rounding.
    tolerance = 1e-5 if size == (64, 64) else 2e-2
    a, b = (encoder.image_features([image(*size), image(*size, seed=1)]) for encoder in (ours, theirs))
    assert (a - b).norm() < tolerance * b.norm()
    a, b = (encoder.text_features(TEXTS) for encoder in (ours, theirs))
    assert (a - b).norm() < 1e-5 * b.norm()


def test_transformers_features_are_those_of_the_model_itself(transformers_folder):
    encoder = load_encoder(f"transformers:{transformers_folder}")
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(image())
    tokens = open_clip.tokenizer.SimpleTokenizer()(TEXTS[:2], 77)
    with torch.inference_mode():
        vision = model.visual_projection(model.vision_model(pixels[None]).pooler_output)
        text = model.text_projection(model.text_model(tokens).pooler_output)
    torch.testing.assert_close(encoder.image_features([image()]), vision, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.text_features(TEXTS[:2]), text, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_open_clip_takes_a_files_weights(tmp_path):
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = load_encoder(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}")
    pixels = encoder.prepare(image(224, 224))
    assert pixels.shape == (3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.image_features([image(224, 224)]), model.encode_image(pixels[None]))


@pytest.fixture
def small_open_clip(monkeypatch, tmp_path):
    """open_clip's architectures with two narrow layers, and its downloads replaced by random weights."""
    import open_clip.factory as factory

    small = {}
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "RN50", "ViT-H-14-quickgelu"):
        config = copy.deepcopy(factory._MODEL_CONFIGS[name])
        vision = {"layers": [1, 1, 1, 1] if name.startswith("RN") else 2, "width": 32 if name.startswith("RN") else 64}
        config["vision_cfg"] |= vision | ({} if name.startswith("RN") else {"head_width": 32})
        config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
        small[name] = config
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)

    def download(configuration, **_):
        shape = copy.deepcopy(small[download.architecture])
        model = open_clip.model.CLIP(**{key: value for key, value in shape.items() if key != "quick_gelu"})
        torch.save(model.state_dict(), tmp_path / "download.pt")
        return str(tmp_path / "download.pt")

    monkeypatch.setattr(factory, "download_pretrained", download)
    return download


def activations(encoder):
    """The classes of the modules between the layers of the transformers."""
    names = {"GELU", "QuickGELU"}
    return {type(part).__name__ for part in encoder.module.modules()} & names


@pytest.mark.parametrize(
    ("name", "expected"),
    mostly_slow(
        [
            ("ViT-B-32/openai", "QuickGELU"),
            ("ViT-B-32/laion400m_e31", "QuickGELU"),
            ("ViT-B-32/metaclip_400m", "QuickGELU"),
            ("ViT-B-32/laion2b_s34b_b79k", "GELU"),
            ("ViT-B-32/datacomp_xl_s13b_b90k", "GELU"),
            ("ViT-B-32-quickgelu/openai", "QuickGELU"),
            ("ViT-B-32-quickgelu/laion400m_e32", "QuickGELU"),
            ("ViT-H-14-quickgelu/dfn5b", "QuickGELU"),
            ("RN50/openai", "QuickGELU"),
        ],
        ("ViT-B-32/laion2b_s34b_b79k", "GELU"),
        ("RN50/openai", "QuickGELU"),
    ),
)
def test_open_clip_is_built_with_the_activation_of_its_weights(small_open_clip, name, expected, recwarn):
    small_open_clip.architecture = name.partition("/")[0]
    assert activations(load_encoder(f"open_clip:{name}")) == {expected}
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]


@pytest.mark.parametrize("through", ["warnings", "the root's log", "the library's log"])
def test_a_warning_of_the_library_reaches_the_user(small_open_clip, monkeypatch, through):
    def download(*_, **__):
        if through == "warnings":
            warnings.warn("these weights are\nnot the ones", stacklevel=1)
        else:
            logging.getLogger("open_clip" if "library" in through else None).warning("these weights are not the ones")
        return small_open_clip(None)

    small_open_clip.architecture = "ViT-B-32"
    monkeypatch.setattr("open_clip.factory.download_pretrained", download)
    with pytest.warns(UserWarning, match="open_clip:ViT-B-32/openai: these weights are not the ones"):
        load_encoder("open_clip:ViT-B-32/openai")


def test_a_failed_download_is_one_line_without_warnings(small_open_clip, monkeypatch, recwarn):
    def download(*_, **__):
        warnings.warn("about to fail", stacklevel=1)
        raise OSError("no network")

    monkeypatch.setattr("open_clip.factory.download_pretrained", download)
    with pytest.raises(UserError, match="no network"):
        load_encoder("open_clip:ViT-B-32/openai")
    assert not [warning for warning in recwarn if "about to fail" in str(warning.message)]


def test_weights_in_a_file_do_not_say_their_activation(small_open_clip, tmp_path):
    small_open_clip.architecture = "ViT-B-32"
    file = small_open_clip(None)
    with pytest.warns(UserWarning, match="open_clip:ViT-B-32-quickgelu/FILE"):
        assert activations(load_encoder(f"open_clip:ViT-B-32/{file}")) == {"GELU"}
    assert activations(load_encoder(f"open_clip:ViT-B-32-quickgelu/{file}")) == {"QuickGELU"}


CHANGES = {
    "activation": lambda e: setattr(e.module.transformer.resblocks[0].mlp, "gelu", open_clip.transformer.QuickGELU()),
    "heads": lambda e: setattr(e.module.transformer.resblocks[0].attn, "num_heads", 1),
    "epsilon": lambda e: setattr(e.module.ln_final, "eps", 0.1),
    "weights": lambda e: e.module.ln_final.bias.add_(1),
    "precision": lambda e: e.module.half(),
    "preprocessing": lambda e: object.__setattr__(e, "preprocessing", "another"),
    "the processor's settings": lambda e: object.__setattr__(e, "settings", "others"),
}


@pytest.mark.parametrize("change", mostly_slow(CHANGES, "weights"))
def test_whatever_changes_features_changes_their_key(open_clip_folder, change):
    encoder, same = (load_encoder(f"open_clip:{open_clip_folder}") for _ in range(2))
    assert encoder.fingerprint() == same.fingerprint()
    CHANGES[change](encoder)
    assert encoder.fingerprint() != same.fingerprint()


@pytest.mark.slow
def test_the_key_knows_the_processor_of_transformers(transformers_folder, tmp_path):
    shutil.copytree(transformers_folder, tmp_path / "a")
    first = load_encoder(f"transformers:{tmp_path / 'a'}").fingerprint()
    file = tmp_path / "a" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    assert load_encoder(f"transformers:{tmp_path / 'a'}").fingerprint() != first


@pytest.mark.slow
def test_dino_through_timm_is_prepared_as_published(tmp_path):
    """Resize to 256, crop 224, ImageNet's mean and deviation: what DINO, DreamBooth and Custom Diffusion do."""
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    encoder = load_encoder(f"timm:vit_small_patch16_224.dino/{tmp_path / 'dino.pth'}", "instance")
    published = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    wide = image(320, 200)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.image_features([wide]), model(published(wide)[None]), rtol=1e-5, atol=1e-5)


def test_a_vit_of_transformers_gives_its_class_token(tmp_path):
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pixels = transforms.Normalize((0.5,) * 3, (0.5,) * 3)(transforms.ToTensor()(image(32, 32)))
    encoder = load_encoder(f"transformers:{tmp_path}", "instance")
    assert encoder.fingerprint() == load_encoder(f"transformers:{tmp_path}", "instance").fingerprint()
    with torch.inference_mode():
        expected = model(pixels[None]).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.image_features([image(32, 32)]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="reads no texts"):
        encoder.text_features(["a"])
    with pytest.raises(UserError, match="reads no texts"):
        load_encoders(f"transformers:{tmp_path}")


def test_the_embedded_networks_are_encoders_up_to_length():
    pixels = torch.from_numpy(np.array(image())).permute(2, 0, 1)[None].float() / 127.5 - 1
    for role, network in (("clip", load_clip()), ("instance", load_instance_encoder())):
        found = load_encoder("tiny", role).image_features([image()])
        with torch.inference_mode():
            expected = network.image_features(pixels)
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


@pytest.mark.parametrize("name", ["timm:vit_small_patch16_224.dino", "transformers:a/b", "dinov2:vits14", "inception"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    for package in ("timm", "transformers", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, package, None)
    for look in (load_encoder, check_encoder):
        with pytest.raises(UserError, match=r"the extra 'eval' installs: pip install '.*\[eval\]'"):
            look(name)


def test_names_are_checked_without_weights_and_hub(monkeypatch, transformers_folder):
    def fail(*_, **__):
        raise AssertionError("a file was asked for")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("torch.load", fail)
    monkeypatch.setattr("ldm.embedded_encoders.load_clip", fail)
    for name in ("tiny", "open_clip:ViT-B-32/openai", "timm:vit_small_patch16_224.dino", "transformers:a/b"):
        check_encoder(name)
    check_encoders("tiny", "dinov2:vitb14_reg", f"transformers:{transformers_folder}")
    for name in ("nope", "open_clip:ViT-B-32", "timm:not_a_model", "transformers:/no/such", "dinov2:x", "dreamsim:/no"):
        with pytest.raises(UserError):
            check_encoder(name)


def test_features_are_kept_by_content_and_weights(tmp_path):
    image().save(tmp_path / "a.png")
    image().save(tmp_path / "copy.png")
    image(seed=1).save(tmp_path / "b.png")
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
    expected = theirs(torch.from_numpy(np.array(image())).permute(2, 0, 1)[None])
    torch.testing.assert_close(encoder.image_features([image()]), expected, rtol=1e-5, atol=1e-5)
