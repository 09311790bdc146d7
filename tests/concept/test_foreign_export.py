"""Exported concepts: diffusers makes the same latents of them, other programs' loaders the same weights."""

import dataclasses
import itertools

import foreign_models
import pytest
import torch
from diffusers import StableDiffusionPipeline
from foreign_models import (
    CONFIGS,
    PROMPT,
    concept_of,
    first_noise,
    lora_concept,
    model_of,
    our_latents,
    relative,
    their_latents,
)
from helpers import mostly_slow

from dci.concept.foreign.export import FORMATS, export
from dci.concept.foreign.layers import Layers
from ldm.checkpoint import load_model
from ldm.errors import UserError
from ldm.formats.diffusers_export import write_folder
from ldm.formats.weights import read_safetensors

WORDS = PROMPT.replace("V*", "mycat")


@dataclasses.dataclass
class Case:
    """A model, a concept, its latents, and a folder with the base for diffusers."""

    model: object
    concept: object
    folder: object
    noise: torch.Tensor
    ours: torch.Tensor

    def pipeline(self):
        return quiet(StableDiffusionPipeline.from_pretrained(self.folder))

    def error(self, pipe, out):
        """Relative difference of their latents, with the exported tokens, from ours."""
        pipe.load_textual_inversion(str(out / "mycat.safetensors"), token="mycat")
        return relative(their_latents(pipe, WORDS, self.noise), self.ours)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def case(config, concept, folder):
    torch.manual_seed(1)
    model = model_of(CONFIGS[config]())
    write_folder(model.state_dict(), model.config, folder)
    concept, noise = concept(model), first_noise(model)
    plain = our_latents(model, concept, noise)
    undo = concept.apply(model)
    ours = our_latents(model, concept, noise)
    undo()
    assert relative(plain, ours) > 1e-2  # else a file that changes nothing would pass
    return Case(model, concept, folder, noise, ours)


def every_attention_weight(model):
    """training.trainable=crossattn: queries and outputs too, with biases."""
    return concept_of(
        model,
        ("attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias"),
    )


CONCEPTS = {"keys and values": concept_of, "cross-attention": every_attention_weight, "LoRA": lora_concept}
KINDS = [
    *itertools.product(["v1", "v2"], ["keys and values", "LoRA"]),
    ("v1", "cross-attention"),
    ("SD 1.x widths", "keys and values"),
]


def slow(kind):
    return pytest.param(kind, marks=() if kind == ("v1", "keys and values") else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(slow, KINDS), ids=" ".join)
def each(request, tmp_path_factory):
    config, concept = request.param
    return case(config, CONCEPTS[concept], tmp_path_factory.mktemp("base"))


def lora_by_diffusers(pipe, out):
    pipe.load_lora_weights(str(out), weight_name="mycat-lora.safetensors")  # offline, older releases want the name


def custom_diffusion_by_diffusers(pipe, out):
    pipe.unet.load_attn_procs(out, weight_name="pytorch_custom_diffusion_weights.bin", _pipeline=pipe)


@pytest.mark.parametrize(("to", "load"), [("lora", lora_by_diffusers), ("diffusers", custom_diffusion_by_diffusers)])
def test_diffusers_makes_the_same_latents(each, to, load, tmp_path):
    done = export(each.concept, each.model, to, tmp_path)
    pipe = each.pipeline()
    load(pipe, tmp_path)
    carries_all = not done.left
    assert carries_all or any("left out" in line for line in done.said)
    assert (each.error(pipe, tmp_path) < 1e-4) == carries_all


@pytest.mark.slow
def test_a_folder_with_the_concept_merged_is_a_pipeline(each, tmp_path):
    if each.concept.low_rank:
        pytest.skip("fp16 rounds sums of weight and change, which these latents see")
    export(each.concept, each.model, "checkpoint", tmp_path, as_folder=True)
    pipe = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "mycat-diffusers"))
    assert each.error(pipe, tmp_path) < 1e-4


# The other programs' arithmetic. Their names of layers are made of diffusers' modules, as these programs make them.


def modules_of(pipe):
    text = pipe.text_encoder
    own = "" if any(name.startswith("text_model.") for name, _ in text.named_modules()) else "text_model."
    unet = {"lora_unet_" + name.replace(".", "_"): module for name, module in pipe.unet.named_modules()}
    return unet | {"lora_te_" + (own + name).replace(".", "_"): module for name, module in text.named_modules()}


def a1111(weight, part):
    if "diff" in part:
        return part["diff"]
    up, down = part["lora_up.weight"].float(), part["lora_down.weight"].float()
    scale = part["alpha"].item() / down.shape[0]
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weight.shape) * scale


def comfyui(weight, part):
    if "diff" in part:
        return part["diff"]
    up, down = part["lora_up.weight"].float(), part["lora_down.weight"].float()
    return (part["alpha"].item() / down.shape[0]) * torch.mm(up.flatten(1), down.flatten(1)).reshape(weight.shape)


def sd_scripts(weight, part):
    up, down = part["lora_up.weight"].float(), part["lora_down.weight"].float()
    scale = part["alpha"].item() / down.shape[0]
    if weight.ndim == 2:
        return scale * (up @ down)
    if down.shape[2:] == (1, 1):
        return scale * (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None]
    return scale * torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)


@torch.no_grad()
def add(pipe, file, arithmetic):
    """Add a file's changes to a pipeline's weights; a key that has no place is an error."""
    modules, tensors = modules_of(pipe), read_safetensors(file)[0]
    for layer, names in itertools.groupby(sorted(tensors), lambda name: name.partition(".")[0]):
        part = {name.partition(".")[2]: tensors[name] for name in names}
        if "diff_b" in part:
            modules[layer].bias += part.pop("diff_b").float()
        if part:
            modules[layer].weight += arithmetic(modules[layer].weight, part).float()


@pytest.mark.parametrize(
    ("to", "arithmetic"),
    mostly_slow(
        [("lora", a1111), ("lora", comfyui), ("lora", sd_scripts), ("diff", a1111), ("diff", comfyui)],
        ("lora", sd_scripts),
        ("diff", a1111),
    ),
)
def test_other_programs_compute_the_same(each, to, arithmetic, tmp_path):
    done = export(each.concept, each.model, to, tmp_path)
    pipe = each.pipeline()
    add(pipe, tmp_path / f"mycat-{to}.safetensors", arithmetic)
    assert (each.error(pipe, tmp_path) < 1e-4) == (not done.left)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return case("v1", concept_of, tmp_path_factory.mktemp("base"))


def test_every_layer_has_a_rank_and_an_alpha_of_one(small, tmp_path):
    export(small.concept, small.model, "lora", tmp_path / "exact")
    export(small.concept, small.model, "lora", tmp_path / "low", rank=3)
    places = ("down_blocks_0", "down_blocks_1", "mid_block", "up_blocks_1", "up_blocks_2")
    blocks = [f"{place}_attentions_0" for place in places] + ["up_blocks_1_attentions_1", "up_blocks_2_attentions_1"]
    layers = [f"lora_unet_{block}_transformer_blocks_0_attn2_{kind}" for block in blocks for kind in ("to_k", "to_v")]
    expected = {f"{layer}.{part}" for layer in layers for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    for kind in ("exact", "low"):
        tensors, facts = read_safetensors(tmp_path / kind / "mycat-lora.safetensors")
        assert tensors.keys() == expected
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name.endswith("alpha") else torch.float16)
            assert tensor.numel() > 1 or tensor == 1
        assert facts["ss_base_model_version"] == "sd_v1"
        assert facts["ss_v2"] == "False"
        assert facts["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert facts["modelspec.trigger_phrase"] == "mycat cat"
    assert facts["ss_network_dim"] == "3"


def test_low_rank_says_its_error_and_keeps_it(small, tmp_path):
    done = export(small.concept, small.model, "lora", tmp_path, rank=8)
    error = float(done.said[0].split("reconstruction error ")[1].split()[0])
    base, whole = small.model.state_dict(), small.concept.weights(small.model)
    tensors = read_safetensors(tmp_path / "mycat-lora.safetensors")[0]
    wrong = total = 0
    for kohya, place in Layers.of(small.model.config).kohya.items():
        if f"{kohya}.alpha" in tensors:
            change = whole[place.weight] - base[place.weight]
            found = tensors[f"{kohya}.lora_up.weight"].float() @ tensors[f"{kohya}.lora_down.weight"].float() / 8
            wrong, total = wrong + (found - change).square().sum(), total + change.square().sum()
    assert (wrong / total).sqrt().item() == pytest.approx(error, abs=2e-4)


def test_a_small_change_is_kept_in_full_precision(small, tmp_path):
    """fp16 would round changes of 1e-7 to nothing."""
    base = small.model.state_dict()
    changes = {name: 1e-7 * torch.randn(base[name].shape) for name in small.concept.keys_values}
    export(dataclasses.replace(small.concept, keys_values={}, changes=changes), small.model, "diff", tmp_path)
    tensors = read_safetensors(tmp_path / "mycat-diff.safetensors")[0]
    found = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    assert found.norm().item() == pytest.approx(torch.cat([c.flatten() for c in changes.values()]).norm().item(), rel=0.3)


def test_tokens_beside_and_inside(small, tmp_path):
    export(small.concept, small.model, "lora", tmp_path, bundle=True)
    rows = small.concept.modifiers
    assert torch.equal(read_safetensors(tmp_path / "mycat.safetensors")[0]["mycat"], rows)
    assert torch.equal(read_safetensors(tmp_path / "mycat-lora.safetensors")[0]["bundle_emb.mycat.string_to_param.*"], rows)


def test_a_merged_single_file_is_a_model(small, tmp_path):
    export(small.concept, small.model, "checkpoint", tmp_path)
    foreign_models.tiny_models.write_yaml(small.model.config, tmp_path / "m.yaml")
    merged = load_model(tmp_path / "m.yaml", tmp_path / "mycat-checkpoint.safetensors")
    assert relative(our_latents(merged, small.concept, small.noise), small.ours) < 1e-4


@pytest.mark.parametrize("to", FORMATS)
def test_the_card_says_what_to_do(small, to, tmp_path):
    done = export(small.concept, small.model, to, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert small.concept.base in card
    assert "| class noun | cat |" in card
    assert "contexts" in card
    for file in done.files[:-1]:
        assert file.name in card
        assert file.exists()


REFUSED = {
    "format 'png': expected one of lora": {"to": "png"},
    "a rank belongs to the format lora": {"to": "diff", "rank": 2},
    "tokens can be bundled into the formats lora and diff": {"to": "adobe", "bundle": True},
    "a diffusers folder is a form of the format checkpoint": {"to": "lora", "as_folder": True},
    "words 'dog': an ordinary word": {"to": "lora", "words": ["dog"]},
    "words 'a,b': expected 1 different names": {"to": "lora", "words": ["a", "b"]},
    "words '../x': expected letters": {"to": "lora", "words": ["../x"]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_exported_is_said_in_one_line(small, words, tmp_path):
    with pytest.raises(UserError) as error:
        export(small.concept, small.model, folder=tmp_path, **REFUSED[words])
    assert str(error.value).startswith(words)
    assert not list(tmp_path.iterdir())
