"""DreamSim (Fu et al., NeurIPS 2023): vision transformers tuned by LoRA to what people find alike, as one embedding.

The ensemble puts together DINO's class token behind the last block, before the final norm, and the projected embeddings
of CLIP and OpenCLIP (all ViT-B/16, 768 + 512 + 512 numbers), brings them to unit length and takes their own mean off.
Likeness is the cosine; their distance is 1 less that. Images are squeezed to 224 x 224, whatever their shape.

Read from the folder into which the authors' package unpacks its weights: `NAME_pretrain.pth.tar` and `NAME_lora/` for
each network, and DINO's own `dino_vitbase16_pretrain.pth`, there or in `checkpoints/`.
"""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import read_safetensors
from ldm.errors import UserError
from ldm.formats.pickled import read_pickled

VARIANTS = {
    "ensemble": ("dino_vitb16", "clip_vitb16", "open_clip_vitb16"),
    "dino_vitb16": ("dino_vitb16",),
    "clip_vitb32": ("clip_vitb32",),
    "open_clip_vitb32": ("open_clip_vitb32",),
}
"""The published models, and the networks of each in the order of their features."""

SIZE = 224
HEAD = 64  # numbers of an attention head, in all of them
_DINO_FILES = ("dino_vitbase16_pretrain.pth", "checkpoints/dino_vitbase16_pretrain.pth", "dino_vitb16_pretrain.pth")
_MEAN_STD = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Of ImageNet and of CLIP's images, RGB in [0, 1]."""


class Branch(nn.Module):
    """One of the networks: images (b, 3, 224, 224) in [0, 1] -> features (b, d)."""

    mean: Tensor
    std: Tensor
    projection: Tensor | None

    def __init__(self, name: str, state: dict[str, Tensor], projection: Tensor | None):
        """Build the network whose weights these are.

        Args:
            state: under the names of DINO's vision transformer; its shapes give the size.
            projection: (width, d) behind the class token of CLIP's kind; None: DINO's, taken before the final norm.
        """
        super().__init__()
        self.is_clip = projection is not None
        mean, std = _MEAN_STD["clip" if self.is_clip else "dino"]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.vit = _transformer(name, state)
        if not self.is_clip:
            self.vit.norm = nn.Identity()
        self.register_buffer("projection", projection)

    def forward(self, images: Tensor) -> Tensor:
        token = self.vit((images - self.mean) / self.std)
        return token if self.projection is None else token @ self.projection


class DreamSim(nn.Module):
    """The networks side by side: images (b, 3, 224, 224) in [0, 1] -> (b, d), unit length before the mean was taken off."""

    def __init__(self, branches: list[Branch]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        embedding = nn.functional.normalize(torch.cat([branch(images) for branch in self.branches], -1), dim=-1)
        return embedding - embedding.mean(-1, keepdim=True)


def load_dreamsim(variant: str, folder: str | Path) -> DreamSim:
    """Read a published model from a folder of its weights.

    Raises:
        UserError: no such model, or a file is missing or of another layout.
    """
    if variant not in VARIANTS:
        raise UserError(f"no DreamSim '{variant}': expected one of {', '.join(VARIANTS)}")
    tag = "lora" if variant == "ensemble" else "single_lora"
    return DreamSim([_branch(name, Path(folder), tag) for name in VARIANTS[variant]])


def prepare(image: Image.Image) -> Tensor:
    """Squeeze an RGB image to (3, 224, 224) in [0, 1]."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _branch(name: str, folder: Path, tag: str) -> Branch:
    file = _weights_file(name, folder)
    try:
        state, projection = _state(name, read_pickled(file))
        _add_lora(state, folder / f"{name}_{tag}")
        return Branch(name, state, projection)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} is not of DreamSim's layout ({reason.strip()}): unpack the authors' file again") from error


def _weights_file(name: str, folder: Path) -> Path:
    names = _DINO_FILES if name.startswith("dino") else (f"{name}_pretrain.pth.tar",)
    found = next((folder / file for file in names if (folder / file).is_file()), None)
    if found is None:
        raise UserError(
            f"no {names[0]} in {folder}: unpack the weights of DreamSim there (releases of github.com/ssundaram21/dreamsim)"
            + (", and put DINO's own beside them" if name.startswith("dino") else "")
        )
    return found


def _state(name: str, content: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights under DINO's names, and CLIP's projection."""
    if name.startswith("dino"):
        content = content.get("teacher", content)  # of a whole training; its average is what DINO published
        state = {re.sub(r"^(module\.)?(backbone\.)?", "", key): value.float() for key, value in content.items()}
        return {key: value for key, value in state.items() if not key.startswith("head.")}, None
    state = {key: value.float() for key, value in content["state_dict"].items()}
    return state, state.pop("proj")


def _add_lora(state: dict[str, Tensor], folder: Path) -> None:
    """Add the low-rank changes of a PEFT adapter to the weights: W + alpha / r B A (Hu et al. 2022)."""
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")]
    weights = next((file for file in files[1:] if file.is_file()), None)
    if weights is None or not files[0].is_file():
        raise UserError(
            f"no adapter_config.json with adapter_model.bin or .safetensors in {folder}: unpack DreamSim's weights"
        )
    config = json.loads(files[0].read_text(encoding="utf-8"))
    content = read_safetensors(weights)[0] if weights.suffix == ".safetensors" else read_pickled(weights)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        match = re.search(r"(blocks\.\d+\.attn\.qkv)\.lora_([AB])(?:\.\w+)?\.weight$", key)
        if not match:
            raise ValueError(f"unknown weight {key}")
        factors.setdefault(f"{match[1]}.weight", {})[match[2]] = value.float()
    for name, pair in factors.items():
        state[name] = state[name] + config["lora_alpha"] / config["r"] * pair["B"] @ pair["A"]


def _transformer(name: str, state: dict[str, Tensor]) -> nn.Module:
    """timm's vision transformer with weights under DINO's names, of the size that they have."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    clip = "pos_drop.weight" in state  # where CLIP has a norm before its blocks, the authors put it in DINO's dropout
    if clip:
        state = {key.replace("pos_drop.", "norm_pre."): value for key, value in state.items()}
        bias = state.pop("patch_embed.proj.bias", None)
        if bias is not None:  # timm has none there: the same is added to each patch with its position
            positions = state["pos_embed"].clone()
            positions[:, 1:] += bias
            state["pos_embed"] = positions
    network = VisionTransformer(
        img_size=patch * math.isqrt(state["pos_embed"].shape[1] - 1),
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=width // HEAD,
        num_classes=0,
        global_pool="token",
        pre_norm=clip,
        norm_layer=partial(nn.LayerNorm, eps=1e-5 if clip else 1e-6),
        act_layer=QuickGELU if clip and not name.startswith("open_clip") else nn.GELU,
    )
    network.load_state_dict(state)
    return network
