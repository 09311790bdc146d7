"""LoRA: changes of low rank, W = W_base + (alpha / rank) up down, by the names of kohya's scripts and of PEFT."""

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dci.concept.concept_file import LowRank
from dci.concept.foreign.content import Content, add_low_rank
from dci.concept.foreign.half import half
from dci.concept.foreign.layers import KOHYA_PAIR, KOHYA_TEXT, KOHYA_UNET, Layers, Place
from ldm.errors import UserError

State = dict[str, Tensor]
PEFT_CONFIG = "lora_adapter_metadata"  # where the header has PEFT's configuration
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora.up.bias": ".lora_up.bias",
    "_lora.up.bias": ".lora_up.bias",
    ".lora_linear_layer.up.bias": ".lora_up.bias",
    ".lora_B.bias": ".lora_up.bias",
    ".lora_B.default.bias": ".lora_up.bias",
    ".diff": ".diff",
    ".diff_b": ".diff_b",
    ".w_norm": ".diff",
    ".b_norm": ".diff_b",
    ".set_weight": ".set_weight",
    DOWN: DOWN,
    UP: UP,
    ".lora_up.bias": ".lora_up.bias",
    ALPHA: ALPHA,
}
_PREFIXES = (
    ("lora_te1_", KOHYA_TEXT),
    ("unet.", KOHYA_UNET),
    ("text_encoder.", KOHYA_TEXT),
    ("text_encoder_2.", KOHYA_PAIR[1]),
    ("model.diffusion_model.", KOHYA_UNET),
    ("diffusion_model.", KOHYA_UNET),
)
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with Tucker factors",
    "lora_embedding_": "LoRA of an embedding",
    "on_input": "IA3",
}
_MARKS = (".lora_", ".lora.", "_lora.", ".diff", ".w_norm", ".set_weight", *("." + mark for mark in _REFUSED))


def is_lora(state: dict[str, Tensor]) -> bool:
    """Whether tensors are those of a LoRA, or of whole differences by a LoRA's names."""
    return any(mark in name for name in state for mark in _MARKS)


def read(state: dict[str, Tensor], metadata: dict[str, str], layers: Layers, source: str) -> Content:
    """Return what a LoRA file changes.

    Args:
        metadata: the file's header, where PEFT's alphas may stand.

    Raises:
        UserError: it is of a kind that is not understood, or made for another model.
    """
    _refuse(state, layers, source)
    parts: dict[str, State] = {}
    for name, tensor in state.items():
        layer, ending = _normal(name, source)
        parts.setdefault(layer, {})[ending] = tensor
    scales = _PeftScales(metadata, layers, source)
    content, ignored = Content("LoRA"), []
    kinds = Counter(ending for part in parts.values() for ending in part)
    for layer, tensors in parts.items():
        place = _place(layer, layers, source)
        if place is None:
            ignored.append(layer)
            continue
        _add(content, place, tensors, layers, partial(scales, layer), f"{source}: {layer}")
    kind = "whole differences (.diff)" if kinds[".diff"] and not kinds[DOWN] else "LoRA"
    peft = any(".lora_A." in name or ".lora." in name or "_lora." in name for name in state)
    said = (f"{len(ignored)} layers of the text encoder are left out: the model does not run them",) if ignored else ()
    trigger = metadata.get("modelspec.trigger_phrase", "")
    return content.with_(kind=f"{kind} by {'PEFT' if peft else 'kohya'}'s names", said=said, trigger=trigger)


def _refuse(state: dict[str, Tensor], layers: Layers, source: str) -> None:
    for mark, kind in _REFUSED.items():
        name = next((name for name in state if f".{mark}" in name), None)
        if name:
            raise UserError(f"{source} is a {kind} ({name}), whose changes are not understood: give a plain LoRA")
    if not layers.text_2 and any(name.startswith((KOHYA_PAIR[1], "text_encoder_2.")) for name in state):
        raise UserError(
            f"{source} is a LoRA of Stable Diffusion XL (it changes a second text encoder): give the model "
            "that it was made for as model="
        )


def _normal(name: str, source: str) -> tuple[str, str]:
    """Return kohya's name of a tensor's layer, and the tensor's ending there."""
    ending = next((end for end in sorted(_ENDINGS, key=len, reverse=True) if name.endswith(end)), None)
    if ending is None:
        raise UserError(f"{source} has '{name}', which belongs to no LoRA that is understood here")
    layer = name.removesuffix(ending).removeprefix("base_model.model.")
    layer = layer.replace(".processor.", ".") if ending.startswith("_lora") else layer.replace(".processor", "")
    layer = re.sub(r"\.to_out$", ".to_out.0", layer) if ending.startswith("_lora") else layer
    prefix, kohya = next(((theirs, ours) for theirs, ours in _PREFIXES if layer.startswith(theirs)), ("", ""))
    layer = layer.removeprefix(prefix)
    if prefix in ("text_encoder.", "text_encoder_2.") and not layer.startswith("text_model."):
        layer = "text_model." + layer  # transformers 5 leaves it away
    if not prefix and not layer.startswith("lora_"):  # an adapter saved by PEFT itself names no network
        text = layer.startswith(("text_model.", "encoder.layers."))
        kohya = KOHYA_TEXT if text else KOHYA_UNET
        layer = layer if not text or layer.startswith("text_model.") else "text_model." + layer
    return kohya + layer.replace(".", "_"), _ENDINGS[ending]


def _place(layer: str, layers: Layers, source: str) -> Place | None:
    """Return where a layer is; None for one behind the last that the model's text encoder runs."""
    if layer in layers.kohya:
        return layers.kohya[layer]
    number = re.match(KOHYA_TEXT + r"text_model_encoder_layers_(\d+)_", layer)
    if number and int(number[1]) == layers.config.text_encoder.layers and layers.config.text_encoder.kind == "openclip":
        return None
    raise UserError(
        f"{source} changes '{layer}', which the model '{layers.config.name}' does not have: give the model "
        "that the file was made for as model="
    )


def _add(
    content: Content, place: Place, tensors: State, layers: Layers, scale_of: Callable[[int], float], what: str
) -> None:
    """Put the change of one layer into a content.

    Args:
        scale_of: (rank) -> scale of the change, where the file has no alpha.
        what: the layer, for messages.
    """
    shape = layers.shapes[place.weight]
    if DOWN in tensors or UP in tensors:
        if not {DOWN, UP} <= tensors.keys():
            raise UserError(f"{what} lacks one of its two factors: the file is damaged, fetch or make it anew")
        change, scale = _factors(tensors, shape, place, scale_of, what)
        old = content.low_rank.get(place.weight)
        content.low_rank[place.weight] = add_low_rank(old, change) if old else change
        if ".lora_up.bias" in tensors:
            _add_change(content, place, place.bias, scale * tensors[".lora_up.bias"].float(), layers, what)
    for ending, name in ((".diff", place.weight), (".diff_b", place.bias)):
        if ending in tensors:
            _add_change(content, place, name, tensors[ending], layers, what)
    if ".set_weight" in tensors:
        _fitting(tensors[".set_weight"], shape, place, what)
        content.weights[place.weight] = tensors[".set_weight"].view(shape)


def _factors(
    tensors: State, shape: torch.Size, place: Place, scale_of: Callable[[int], float], what: str
) -> tuple[LowRank, float]:
    """Return a layer's change with the scale inside, and the scale: alpha / rank."""
    down, up, rank = tensors[DOWN], tensors[UP], len(tensors[DOWN])
    rows = shape[0] // place.part[1]
    if up.shape[:2] != (rows, rank) or up.numel() != rows * rank or down.numel() != rank * shape[1:].numel():
        raise UserError(
            f"{what} changes a weight of {up.shape[0]} rows and {down[0].numel()} columns, expected "
            f"{rows} and {shape[1:].numel()}: it is made for another model"
        )
    if ALPHA in tensors and tensors[ALPHA].numel() != 1:
        raise UserError(f"{what} has an alpha of {tensors[ALPHA].numel()} numbers, expected one: the file is damaged")
    scale = tensors[ALPHA].item() / rank if ALPHA in tensors else scale_of(rank)
    u = up.reshape(rows, rank)
    scaled = u.float() * scale
    # Where the file's precision holds the scaled numbers, they stay in it.
    u = scaled.to(u.dtype) if torch.equal(scaled.to(u.dtype).float(), scaled) else scaled
    i, number = place.part
    if number > 1:
        u = torch.cat([u if k == i else torch.zeros_like(u) for k in range(number)])
    return LowRank(u, down.reshape(rank, *shape[1:])), scale


def _add_change(content: Content, place: Place, name: str, change: Tensor, layers: Layers, what: str) -> None:
    if name not in layers.shapes:
        raise UserError(f"{what} changes a bias, and the model '{layers.config.name}' has none there")
    shape, (i, number) = layers.shapes[name], place.part
    _fitting(change, shape, place, what)
    if number > 1:
        whole = torch.zeros(shape)
        whole.chunk(number)[i].copy_(change.view(-1, *shape[1:]))
        change = whole + content.changes[name] if name in content.changes else whole
    content.changes[name] = change.view(shape)


def _fitting(tensor: Tensor, shape: torch.Size, place: Place, what: str) -> None:
    if tensor.numel() != shape.numel() // place.part[1]:
        raise UserError(f"{what} has {tuple(tensor.shape)}, expected {tuple(shape)}: it is made for another model")


class _PeftScales:
    """Scales of layers by PEFT's configuration: alpha / rank, or alpha / sqrt(rank) where it says `use_rslora`.

    diffusers puts it into the header as `lora_adapter_metadata`: {"unet.lora_alpha": 8, "unet.alpha_pattern": {...}, ...};
    PEFT itself has it in adapter_config.json beside the file. Without any the scale is 1.
    """

    def __init__(self, metadata: dict[str, str], layers: Layers, source: str):
        try:
            found = json.loads(metadata.get(PEFT_CONFIG, "{}"))
        except ValueError as error:
            raise UserError(f"{source} has a configuration that is not readable ({error}): fetch or make it anew") from error
        self.dotted = {KOHYA_UNET + name.replace(".", "_"): name for name in layers.unet}
        self.dotted |= {KOHYA_TEXT + name.replace(".", "_"): name for name in layers.text}
        self.dotted |= {KOHYA_PAIR[1] + name.replace(".", "_"): name for name in layers.text_2}
        self.configs: dict[str, dict] = {KOHYA_UNET: {}, KOHYA_TEXT: {}, KOHYA_PAIR[1]: {}}
        self.source = source
        for key, value in found.items() if isinstance(found, dict) else ():
            network, _, option = key.rpartition(".")
            for prefix in {
                "": [KOHYA_UNET, KOHYA_TEXT],
                "unet": [KOHYA_UNET],
                "text_encoder": [KOHYA_TEXT],
                "text_encoder_2": [KOHYA_PAIR[1]],
            }.get(network, []):
                self.configs[prefix][option] = value

    def __call__(self, layer: str, rank: int) -> float:
        config = self.configs[next(prefix for prefix in self.configs if layer.startswith(prefix))]
        if config.get("use_dora"):
            raise UserError(f"{self.source} is a DoRA (use_dora), whose changes are not understood: give a plain LoRA")
        try:
            alpha = float(
                _by_pattern(config.get("alpha_pattern"), self.dotted.get(layer, layer), config.get("lora_alpha", rank))
            )
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise UserError(f"{self.source} has a configuration without usable alphas ({error}): make it anew") from error
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(pattern: dict | None, name: str, default: float) -> float:
    """Return what PEFT's pattern says of a layer; its keys are regular expressions for the ends of names."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def write(changes: dict[str, LowRank], layers: Layers) -> tuple[dict[str, Tensor], list[str]]:
    """Return a LoRA file's tensors by kohya's names, and the weights that it cannot carry.

    alpha is 1 in every layer and `lora_up` is times the rank: the one form that every program scales alike,
    whatever the ranks.

    Args:
        changes: of weights and biases, by SD's names.
    """
    tensors: State = {}
    left = []
    for name, change in changes.items():
        layer = name.removesuffix("weight").removesuffix(".")
        if not name.endswith("weight") or layer not in layers.kohya_of or change.v.ndim < 2 or "embedding" in layer:
            left.append(name)
            continue
        for kohya, place in layers.kohya_of[layer]:
            u = change.u.float().chunk(place.part[1])[place.part[0]] * change.u.shape[1]
            tail = (1,) * (change.v.ndim - 2)
            tensors |= {
                kohya + DOWN: half(change.v),
                kohya + UP: half(u.view(*u.shape, *tail)),
                kohya + ALPHA: torch.tensor(1.0),
            }
    return tensors | _recognisable(tensors, layers), left


def _recognisable(tensors: State, layers: Layers) -> State:
    """Return a change by zero that lets diffusers understand the others.

    It recognises kohya's names in a text encoder only by an output projection of attention, and drops changes of
    queries, keys and values without one.
    """
    added: State = {}
    for prefix in (KOHYA_TEXT, *KOHYA_PAIR):
        attention = [name for name in tensors if name.startswith(prefix) and "_self_attn_" in name]
        if not attention or any("_out_proj." in name for name in attention):
            continue
        name = prefix + "text_model_encoder_layers_0_self_attn_out_proj"
        rows, columns = layers.shapes[layers.kohya[name].weight]
        zeros = {DOWN: torch.zeros(1, columns).half(), UP: torch.zeros(rows, 1).half(), ALPHA: torch.tensor(1.0)}
        added |= {name + ending: tensor for ending, tensor in zeros.items()}
    return added
