"""DreamSim and DINOv2 with random weights in files of the published layout, against open_clip, transformers, PEFT, timm."""

import numpy as np
import open_clip
import peft
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision import transforms
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from dci.evaluation.dreamsim import load_dreamsim
from dci.evaluation.encoders import load_encoder
from ldm.errors import UserError

WIDTH, DEPTH, PATCH = 128, 2, 16


def image(width=224, height=224, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip_tower(quick):
    torch.manual_seed(int(quick))
    vision = {"image_size": 224, "layers": DEPTH, "width": WIDTH, "head_width": 64, "patch_size": PATCH}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(64, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=quick)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def as_dino(model):
    """open_clip's vision tower under DINO's names, as the authors converted theirs."""
    state = {name.removeprefix("visual."): value for name, value in model.state_dict().items() if name.startswith("visual.")}
    whole = {
        "cls_token": state["class_embedding"][None, None],
        "pos_embed": state["positional_embedding"][None],
        "patch_embed.proj.weight": state["conv1.weight"],
        "patch_embed.proj.bias": torch.zeros(WIDTH),
        "proj": state["proj"],
    }
    for end in ("weight", "bias"):
        whole |= {f"pos_drop.{end}": state[f"ln_pre.{end}"], f"norm.{end}": state[f"ln_post.{end}"]}
        for i in range(DEPTH):
            block = f"transformer.resblocks.{i}"
            whole[f"blocks.{i}.attn.qkv.{end}"] = state[f"{block}.attn.in_proj_{end}"]
            for ours, theirs in (
                ("norm1", "ln_1"),
                ("norm2", "ln_2"),
                ("attn.proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                whole[f"blocks.{i}.{ours}.{end}"] = state[f"{block}.{theirs}.{end}"]
    return whole


def dino():
    """transformers' ViT, and its weights under DINO's names."""
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
    )
    model = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    return model, under_dinos_names(model.state_dict())


def under_dinos_names(state):
    layer = "encoder.layer" if any(key.startswith("encoder.layer.") for key in state) else "layers"
    whole = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    names = {
        "norm1": ("layernorm_before", "norm1"),
        "norm2": ("layernorm_after", "norm2"),
        "attn.proj": ("attention.output.dense", "attention.o_proj"),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
    }
    for end in ("weight", "bias"):
        whole[f"patch_embed.proj.{end}"] = state[f"embeddings.patch_embeddings.projection.{end}"]
        whole[f"norm.{end}"] = state[f"layernorm.{end}"]
        for i in range(DEPTH):

            def own(*ways, i=i, end=end):
                return next(state[f"{layer}.{i}.{way}.{end}"] for way in ways if f"{layer}.{i}.{way}.{end}" in state)

            whole[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(
                [own(f"attention.attention.{part}", f"attention.{part[0]}_proj") for part in ("query", "key", "value")]
            )
            whole |= {f"blocks.{i}.{ours}.{end}": own(*theirs) for ours, theirs in names.items()}
    return whole


class Attention(nn.Module):
    """Of a transformer, what PEFT is to change."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)


class Stub(nn.Module):
    """A transformer's skeleton for PEFT to put its adapters on."""

    def __init__(self, state):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(DEPTH))
        self.load_state_dict({key: value for key, value in state.items() if ".attn.qkv." in key})


def add_adapter(folder, state, seed):
    """Write an adapter by PEFT itself; return the weights that PEFT makes of these with it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=16, lora_alpha=0.5, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    model = peft.get_peft_model(Stub(state), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return {**state, **merged}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The ensemble's folder, and each network with the adapter in it, by the library that it is from."""
    folder, networks = tmp_path_factory.mktemp("dreamsim"), {}
    for name, quick in (("clip_vitb16", True), ("open_clip_vitb16", False)):
        model = clip_tower(quick)
        state = as_dino(model)
        torch.save({"state_dict": state}, folder / f"{name}_pretrain.pth.tar")
        tuned = add_adapter(folder / f"{name}_lora", state, 3 + quick)
        for i, block in enumerate(model.visual.transformer.resblocks):
            block.attn.in_proj_weight.copy_(tuned[f"blocks.{i}.attn.qkv.weight"])
        networks[name] = model
    model, state = dino()
    torch.save(
        {"teacher": {f"module.backbone.{key}": value for key, value in state.items()}, "epoch": 1},
        folder / "dino_vitb16_pretrain.pth",
    )
    tuned = add_adapter(folder / "dino_vitb16_lora", state, 7)
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    for i, layer in enumerate(layers):
        parts = tuned[f"blocks.{i}.attn.qkv.weight"].chunk(3)
        inner = getattr(layer.attention, "attention", layer.attention)
        owners = [getattr(inner, name, None) or getattr(inner, f"{name[0]}_proj") for name in ("query", "key", "value")]
        for owner, part in zip(owners, parts, strict=True):
            owner.weight.copy_(part)
    networks["dino_vitb16"] = model
    return folder, networks


def expected(networks, picture):
    pixels = transforms.ToTensor()(picture)[None]
    clip = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))(pixels)
    imagenet = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels)
    before_norm = networks["dino_vitb16"](pixel_values=imagenet, output_hidden_states=True).hidden_states[-1][:, 0]
    parts = [before_norm, networks["clip_vitb16"].encode_image(clip), networks["open_clip_vitb16"].encode_image(clip)]
    embedding = torch.cat(parts, -1)
    embedding = embedding / embedding.norm()
    return embedding - embedding.mean()


@torch.inference_mode()
def test_the_ensemble_is_its_networks_with_pefts_adapters(published):
    folder, networks = published
    encoder = load_encoder(f"dreamsim:{folder}", "instance")
    found = encoder.image_features([image()])
    assert found.shape == (1, WIDTH + 64 + 64)
    torch.testing.assert_close(found, expected(networks, image()), rtol=1e-4, atol=2e-6)
    assert not torch.allclose(found, encoder.image_features([image(seed=1)]), atol=1e-3)


def test_images_are_squeezed_whole(published):
    encoder = load_encoder(f"dreamsim:ensemble/{published[0]}", "instance")
    wide = image(320, 200)
    squeezed = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)(wide)
    torch.testing.assert_close(encoder.prepare(wide), transforms.ToTensor()(squeezed))


def test_a_bias_of_the_patches_goes_into_their_positions(published, tmp_path):
    """The class token has a position too, and no bias."""
    folder, networks = published
    state = as_dino(networks["clip_vitb16"])
    bias, positions = torch.randn(WIDTH), state["pos_embed"].clone()
    torch.save({"state_dict": state}, tmp_path / "clip_vitb32_pretrain.pth.tar")
    add_adapter(tmp_path / "clip_vitb32_single_lora", state, 9)
    plain = load_dreamsim("clip_vitb32", tmp_path)
    positions[:, 1:] -= bias
    torch.save(
        {"state_dict": state | {"patch_embed.proj.bias": bias, "pos_embed": positions}},
        tmp_path / "clip_vitb32_pretrain.pth.tar",
    )
    shifted, pixels = load_dreamsim("clip_vitb32", tmp_path), torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(shifted.eval()(pixels), plain.eval()(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "dino_vitb16_pretrain.pth").unlink(), ["dino_vitbase16_pretrain.pth", "DINO's own"]),
        (lambda folder: (folder / "clip_vitb16_pretrain.pth.tar").unlink(), ["no clip_vitb16_pretrain.pth.tar"]),
        (lambda folder: (folder / "open_clip_vitb16_lora/adapter_config.json").unlink(), ["adapter_config.json"]),
        (lambda folder: torch.save({"state_dict": {}}, folder / "clip_vitb16_pretrain.pth.tar"), ["DreamSim's layout"]),
    ],
)
def test_what_is_missing_is_one_line(published, tmp_path, spoil, words):
    import shutil

    shutil.copytree(published[0], tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises(UserError) as error:
        load_encoder(f"dreamsim:{tmp_path / 'copy'}")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dreamsim:/no/such/folder", ["no folder '/no/such/folder'", "dreamsim:FOLDER"]),
        ("dreamsim:clip_vitb32", ["no folder ''", "clip_vitb32"]),
        ("dinov2:vits16", ["vits14", "_reg"]),
        ("dinov2:vitb14", ["hub cannot be reached", "dinov2:FOLDER"]),
    ],
)
def test_names_that_lead_nowhere(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_encoder(name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@torch.inference_mode()
def test_dinov2_is_timms(tmp_path):
    """Its normed class token, of images resized to 256 and cut to 224, ImageNet's mean and deviation."""
    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=224, patch_size=14)
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(tmp_path)
    theirs = VisionTransformer(
        img_size=224,
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
        init_values=1.0,
        global_pool="token",
    ).eval()
    state = model.state_dict()
    whole = under_dinos_names(state)
    for i in range(DEPTH):
        for ours, ways in (("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")):
            whole[f"blocks.{i}.{ours}"] = next(value for key, value in state.items() if key.endswith(f".{i}.{ways}"))
    theirs.load_state_dict(whole)
    encoder = load_encoder(f"dinov2:{tmp_path}", "instance")
    published = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    wide = image(320, 256)
    torch.testing.assert_close(encoder.image_features([wide]), theirs(published(wide)[None]), rtol=1e-3, atol=1e-3)
