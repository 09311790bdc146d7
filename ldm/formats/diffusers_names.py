"""Between diffusers' and transformers' names of tensors and those of Stable Diffusion's checkpoints, both ways.

The UNet's blocks are numbered through in SD and by level in diffusers, so the UNet's names follow from
the number of levels and of residual blocks in each; see `unet_blocks`.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import AutoencoderConfig, TextEncoderConfig, UNetConfig

State = dict[str, Tensor]

_UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE = (  # where # stands for a number
    ("encoder.down_blocks.#.resnets.", "encoder.down.#.block."),
    ("encoder.down_blocks.#.downsamplers.0.", "encoder.down.#.downsample."),
    ("decoder.up_blocks.#.resnets.", "decoder.up.#.block."),
    ("decoder.up_blocks.#.upsamplers.0.", "decoder.up.#.upsample."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)
_VAE_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "group_norm": "norm",
}
_VAE_ATTENTION_BACK = tuple(  # the names that diffusers itself writes
    (f".mid_block.attentions.0.{theirs}.", f".mid.attn_1.{_VAE_ATTENTION[theirs]}.")
    for theirs in ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
)
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}
_OPENCLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def unet_blocks(config: UNetConfig) -> dict[str, str]:
    """Return where each of diffusers' numbered layers is in SD: {"down_blocks.0.resnets.0.": "input_blocks.1.0.", ...}.

    On the way down a level has n residual blocks and a downsampling, on the way up n + 1 blocks, with the
    upsampling inside the last. SD's blocks hold [residual block, transformer if any, upsampling if any].
    """
    names, levels, n = {}, len(config.channel_mult), config.num_res_blocks
    for level in range(levels):
        for i in range(n):
            block = 1 + level * (n + 1) + i
            names[f"down_blocks.{level}.resnets.{i}."] = f"input_blocks.{block}.0."
            names[f"down_blocks.{level}.attentions.{i}."] = f"input_blocks.{block}.1."
        names[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{(level + 1) * (n + 1)}.0.op."
        for i in range(n + 1):
            block = level * (n + 1) + i
            names[f"up_blocks.{level}.resnets.{i}."] = f"output_blocks.{block}.0."
            names[f"up_blocks.{level}.attentions.{i}."] = f"output_blocks.{block}.1."
        attention = config.depths[levels - 1 - level] > 0
        last = level * (n + 1) + n
        names[f"up_blocks.{level}.upsamplers.0.conv."] = f"output_blocks.{last}.{2 if attention else 1}.conv."
    return names


def unet_names(state: State, config: UNetConfig) -> State:
    """Rename the tensors of a UNet2DConditionModel."""
    places = {**_UNET, **unet_blocks(config)}

    def rename(name: str) -> str:
        for theirs, ours in places.items():
            if name.startswith(theirs):
                rest = name[len(theirs) :]
                return ours + (_prefix(rest, _RESNET) if ".resnets." in theirs else rest)
        return name

    return {"model.diffusion_model." + rename(name): tensor for name, tensor in state.items()}


def vae_names(state: State, config: AutoencoderConfig) -> State:
    """Rename the tensors of an AutoencoderKL, whose attention projections SD stores as 1x1 convolutions."""
    last = len(config.ch_mult) - 1
    renamed = {}
    for name, tensor in state.items():
        name, attention = _vae_attention(name)
        if attention and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for theirs, ours in _VAE:
            name = _replaced(name, theirs, ours)
        # SD counts the decoder's levels from the full resolution on.
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)
        renamed["first_stage_model." + name] = tensor
    return renamed


def _replaced(name: str, old: str, new: str) -> str:
    """Rename a part of the VAE's name, by an entry of `_VAE`."""
    return re.sub(re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1"), name)


def _vae_attention(name: str) -> tuple[str, bool]:
    """Rename a tensor of the VAE's attention; and say whether it is one."""
    match = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    if not match or match[2] not in _VAE_ATTENTION:
        return name, False
    part = _VAE_ATTENTION[match[2]]
    return f"{match[1]}.mid.attn_1.{part}.{match[3]}", match[3] == "weight" and part != "norm"


def text_names(state: State, config: TextEncoderConfig, place: str = "cond_stage_model.") -> State:
    """Rename the tensors of a CLIPTextModel; transformers 5 leaves the prefix `text_model.` away.

    Args:
        place: what SD's names begin with.
    """
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if config.kind == "clip":
        return {f"{place}transformer.text_model.{name}": tensor for name, tensor in state.items()}
    return {f"{place}model.{name}": tensor for name, tensor in _openclip(state).items()}


def _openclip(state: State) -> State:
    """Rename to open_clip's names, which hold queries, keys and values in one matrix."""
    renamed: State = {}
    projections: dict[str, State] = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":  # a matrix that rows are multiplied by, and there a linear layer's
            renamed["text_projection"] = tensor.T
            continue
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if not layer:
            renamed[_prefix(name, _OPENCLIP)] = tensor
            continue
        place = f"transformer.resblocks.{layer[1]}."
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
        if projection:
            projections.setdefault(f"{place}attn.in_proj_{projection[2]}", {})[projection[1]] = tensor
        else:
            renamed[place + _prefix(layer[2], _OPENCLIP_LAYER)] = tensor
    for name, parts in projections.items():
        if len(parts) == 3:  # else the name stays missing, which loading reports
            renamed[name] = torch.cat([parts[part] for part in "qkv"])
    return renamed


def _prefix(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def to_unet(config: UNetConfig) -> Callable[[str], str]:
    """Return what gives diffusers' name of a tensor or module of the UNet, the way back of `unet_names`.

    It takes SD's names without the prefix `model.diffusion_model.`; modules end in a dot, as the tables' entries do.
    """
    # The longest first: an upsampling may stand where another level has a transformer.
    places = sorted(((ours, theirs) for theirs, ours in {**_UNET, **unet_blocks(config)}.items()), key=lambda p: -len(p[0]))
    inner = {ours: theirs for theirs, ours in _RESNET.items()}

    def rename(name: str) -> str:
        for ours, theirs in places:
            if name.startswith(ours):
                rest = name[len(ours) :]
                return theirs + (_prefix(rest, inner) if ".resnets." in theirs else rest)
        return name

    return rename


def to_vae(state: State, config: AutoencoderConfig) -> State:
    """Rename SD's tensors of the autoencoder, `first_stage_model.` left away, to an AutoencoderKL's."""
    last, renamed = len(config.ch_mult) - 1, {}
    for name, tensor in state.items():
        if ".mid.attn_1." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)
        for theirs, ours in (*_VAE_ATTENTION_BACK, *_VAE):
            name = _replaced(name, ours, theirs)
        renamed[name] = tensor
    return renamed


def to_text(state: State, config: TextEncoderConfig) -> State:
    """Rename SD's tensors of a text encoder, `cond_stage_model.` or the like left away, to a CLIPTextModel's."""
    if config.kind == "clip":
        return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    outer = {ours: theirs for theirs, ours in _OPENCLIP.items()}
    inner = {ours: theirs for theirs, ours in _OPENCLIP_LAYER.items()}
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name == "text_projection":  # see `_openclip`
            renamed["text_projection.weight"] = tensor.T
            continue
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if not layer:
            renamed["text_model." + _prefix(name, outer)] = tensor
            continue
        place = f"text_model.encoder.layers.{layer[1]}."
        projections = re.fullmatch(r"attn\.in_proj_(weight|bias)", layer[2])
        if projections:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {f"{place}self_attn.{part}_proj.{projections[1]}": rows for part, rows in parts}
        else:
            renamed[place + _prefix(layer[2], inner)] = tensor
    return renamed
