"""Imported concepts: round trips of ours, LoRA by PEFT's and kohya's rules, and files that nobody should load."""

import dataclasses
import os
from inspect import signature

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from foreign_models import CONFIGS, concept_of, lora_concept, model_of, relative
from helpers import mostly_slow
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from dci.concept.concept_file import Concept
from dci.concept.foreign.export import export
from dci.concept.foreign.importing import import_concept
from dci.concept.loras import add_loras, as_changes, on_loras, scaled
from dci.concept.prompts import parse_prompt
from ldm.checkpoint import fingerprint
from ldm.errors import UserError
from ldm.formats.diffusers_export import write_folder
from ldm.formats.weights import read_safetensors


@pytest.fixture(scope="module", params=mostly_slow(["v1", "v2"], "v1"))
def model(request):
    torch.manual_seed(2)
    return model_of(CONFIGS[request.param]())


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(2)
    return model_of(CONFIGS["v1"]())


def imported(files, model, noun=None, trigger=None, **options):
    return import_concept(files, noun, trigger, model.config, lambda: model, **options)


FILES = {
    "lora": ["mycat-lora.safetensors", "mycat.safetensors"],
    "lora bundled": ["mycat-lora.safetensors"],
    "diff": ["mycat-diff.safetensors", "mycat.safetensors"],
    "diffusers": ["pytorch_custom_diffusion_weights.bin", "<new1>.bin", "<new2>.bin"],
    "adobe ckpt": ["delta.ckpt"],
    "adobe bin": ["delta.bin"],
    "checkpoint": ["mycat-checkpoint.safetensors", "mycat.safetensors"],
    "checkpoint folder": ["mycat-diffusers", "mycat.safetensors"],
}


@pytest.fixture(scope="module")
def xl():
    torch.manual_seed(2)
    return model_of(tiny_models.small_xl())


@pytest.mark.parametrize("to", mostly_slow([to for to in FILES if to not in ("adobe ckpt", "checkpoint folder")], "lora"))
def test_sdxl_out_and_in_again(xl, to, tmp_path):
    """Tokens are pairs there, and two text encoders have names of their own."""
    test_ours_out_and_in_again(xl, to, tmp_path)


@pytest.mark.slow
def test_a_lora_of_sdxl_names_both_text_encoders(xl, tmp_path):
    test_a_lora_concept_goes_out_and_in_again_with_its_convolutions_and_text(xl, tmp_path)
    tensors, facts = read_safetensors(tmp_path / "mycat-lora.safetensors")
    assert {name.partition("_text_model")[0] for name in tensors if "text_model" in name} == {"lora_te1", "lora_te2"}
    assert facts["ss_base_model_version"].startswith("sdxl_")
    widths = [table.shape[1] for table in xl.text_encoder.token_tables]
    tokens = read_safetensors(tmp_path / "mycat.safetensors")[0]
    assert {name: rows.shape for name, rows in tokens.items()} == {"clip_l": (2, widths[0]), "clip_g": (2, widths[1])}


@pytest.mark.parametrize("to", mostly_slow(FILES, "lora", "diffusers", "adobe bin"))
def test_ours_out_and_in_again(model, to, tmp_path):
    concept = concept_of(model)
    options = {"bundle": to.endswith("bundled"), "as_folder": to.endswith("folder")}
    export(concept, model, to.split()[0], tmp_path, **options)
    back = imported([tmp_path / file for file in FILES[to]], model, "cat").concept
    assert torch.equal(back.modifiers, concept.modifiers)
    assert back.names == concept.names
    assert back.base == concept.base
    weights, expected = back.weights(model), concept.weights(model)
    assert weights.keys() == expected.keys()
    base = model.state_dict()
    for name, weight in weights.items():  # fp16 rounds the weight, or the change
        largest = max(expected[name].abs().max(), (expected[name] - base[name]).abs().max())
        assert (weight - expected[name]).abs().max() <= 2**-11 * largest, name
    back.save(tmp_path / "back.safetensors")
    again = Concept.load(tmp_path / "back.safetensors")
    assert all(torch.equal(w, again.weights(model)[name]) for name, w in weights.items())


def test_a_lora_concept_goes_out_and_in_again_with_its_convolutions_and_text(model, tmp_path):
    concept = lora_concept(model)
    for to in ("lora", "diff"):
        export(concept, model, to, tmp_path)
        back = imported([tmp_path / f"mycat-{to}.safetensors", tmp_path / "mycat.safetensors"], model).concept
        weights, expected = back.weights(model), concept.weights(model)
        for name, weight in expected.items():
            assert relative(weights[name], weight) < 1e-3, name


def test_apply_and_undo_are_exact(model, tmp_path):
    concept, before = lora_concept(model), {n: t.clone() for n, t in model.state_dict().items()}
    undo = concept.apply(model)
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items() if ".in_layers." in n)
    undo()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# LoRA as PEFT makes it and as kohya's scripts write it, against diffusers' networks with it loaded.


@dataclasses.dataclass
class Networks:
    """Our model, a pipeline with the same weights, and inputs."""

    model: object
    pipe: object

    @torch.no_grad()
    def error(self, concept):
        """Relative differences of UNet and text encoder with an imported concept from theirs."""
        model, side = self.model, self.model.config.image_size // self.model.config.autoencoder.downsampling
        x, t = torch.randn(1, 4, side, side), torch.tensor([421])
        text = torch.randn(1, 77, model.config.unet.context_dim)
        ids = torch.tensor([parse_prompt("a V* cat", concept.names).concept_ids])
        undo = concept.apply(model)
        ours, context = model.unet(x, t, text), model.text_encoder.encode(model.text_encoder.embed(ids))
        undo()
        padded = model.text_encoder._pad(ids)
        theirs = self.pipe.text_encoder(padded).last_hidden_state
        return max(relative(ours, self.pipe.unet(x, t, text).sample), relative(context, theirs))


@pytest.fixture
def networks(model, tmp_path):
    write_folder(model.state_dict(), model.config, tmp_path / "base")
    return Networks(model, StableDiffusionPipeline.from_pretrained(tmp_path / "base"))


PEFT = {
    "one rank": {"r": 4, "lora_alpha": 4},
    "alpha over rank": {"r": 4, "lora_alpha": 6},
    "mixed ranks and alphas": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_k": 2, "conv1": 3},
        "alpha_pattern": {"to_q": 5, "mid_block.attentions.0.proj_in": 3},
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {"to_v": 2}},
    "with biases": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["to_out.0", "ff.net.2"]},
}
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "ff.net.0.proj"]


def train(network):
    """Give an adapter's factors random values, the second of them are zero in the beginning."""
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)


@pytest.mark.skipif(
    "unet_lora_adapter_metadata" not in signature(StableDiffusionPipeline.save_lora_weights).parameters,
    reason="this release of diffusers writes no alphas",
)
@pytest.mark.parametrize("kind", mostly_slow(PEFT, "mixed ranks and alphas"))
def test_a_lora_by_peft(networks, kind, tmp_path):
    pipe, rules = networks.pipe, {"target_modules": UNET_LAYERS, **PEFT[kind]}
    pipe.unet.add_adapter(LoraConfig(**rules))
    train(pipe.unet)
    text = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "out_proj", "fc1"])
    inject_adapter_in_model(text, pipe.text_encoder)  # its own add_adapter wants a newer PEFT
    train(pipe.text_encoder)
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = [convert_state_dict_to_diffusers(get_peft_model_state_dict(n)) for n in (pipe.unet, pipe.text_encoder)]
    configs = [pipe.unet.peft_config["default"].to_dict(), text.to_dict()]
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, *layers, unet_lora_adapter_metadata=configs[0], text_encoder_lora_adapter_metadata=configs[1]
    )
    found = imported([tmp_path / "pytorch_lora_weights.safetensors"], networks.model, "cat", "sks")
    assert "LoRA by PEFT's names" in found.said[0]
    assert networks.error(found.concept) < 1e-5


@pytest.mark.slow
def test_the_adapter_of_peft_itself(networks, tmp_path):
    networks.pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=7, target_modules=["to_k"], alpha_pattern={"attn2.to_k": 2}))
    train(networks.pipe.unet)
    state = get_peft_model_state_dict(networks.pipe.unet)
    save_file({f"base_model.model.{n}": t.contiguous() for n, t in state.items()}, tmp_path / "adapter_model.safetensors")
    networks.pipe.unet.peft_config["default"].save_pretrained(tmp_path)
    found = imported([tmp_path], networks.model, "cat", "sks")
    assert networks.error(found.concept) < 1e-5


def kohya_file(model, pipe, alphas, file):
    """A LoRA by kohya's rules: a module for each layer, named after diffusers', scale alpha / rank."""
    tensors, modules = {}, []
    for prefix, network in (("lora_unet_", pipe.unet), ("lora_te_", pipe.text_encoder)):
        own = "" if prefix == "lora_unet_" or hasattr(network, "text_model") else "text_model."
        for name, module in network.named_modules():
            known = any(part in name for part in ("attentions", "layers", "resnets"))
            if known and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                modules.append((prefix + (own + name).replace(".", "_"), module))
    for i, (name, module) in enumerate(modules):
        rank, shape = 1 + i % 4, module.weight.shape
        down, up = 0.1 * torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        alpha = alphas(i, rank)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, file)
    return modules, tensors


ALPHAS = {"alpha 1": lambda i, rank: 1, "no alpha": lambda i, rank: None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALPHAS)
def test_a_lora_by_kohya_as_diffusers_loads_it(networks, kind, tmp_path):
    kohya_file(networks.model, networks.pipe, ALPHAS[kind], tmp_path / "kohya.safetensors")
    networks.pipe.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    found = imported([tmp_path / "kohya.safetensors"], networks.model, "cat", "sks")
    assert "ranks 1 to 4" in found.said[0] or "ranks 1 to" in found.said[0]
    assert networks.error(found.concept) < 1e-5


@torch.no_grad()
def test_a_lora_of_mixed_alphas_by_kohyas_rules(networks, tmp_path):
    """diffusers 0.42 scales these wrongly, so the rule itself is the reference: W + alpha / rank * up down."""
    modules, tensors = kohya_file(networks.model, networks.pipe, lambda i, rank: 0.5 + i % 3, tmp_path / "kohya.safetensors")
    for name, module in modules:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        change = torch.einsum("or,r...->o...", up.flatten(1), down)
        module.weight += tensors[f"{name}.alpha"] / len(down) * change
    found = imported([tmp_path / "kohya.safetensors"], networks.model, "cat", "sks")
    assert networks.error(found.concept) < 1e-5


# Other forms of tokens and deltas.


def state_of(model, names=(".attn2.to_k.weight", ".attn2.to_v.weight"), prefix="model.diffusion_model."):
    state = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.endswith(names)}
    return {n: t + 0.1 * torch.randn(t.shape) for n, t in state.items()}


def tokens_of(model, n):
    return torch.randn(n, model.config.text_encoder.width)


EMBEDDINGS = {
    "A1111": lambda rows: {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": "x",
        "step": 3,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    },
    "kohya": lambda rows: {"emb_params": rows},
    "diffusers": lambda rows: {"<cat-toy>": rows},
    "a row": lambda rows: {"<cat-toy>": rows[0]},
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_embeddings_of_every_form(small, kind, ending, tmp_path):
    rows, file = tokens_of(small, 3), tmp_path / f"x.{ending}"
    content = EMBEDDINGS[kind](rows)
    if ending == "safetensors" and kind == "A1111":
        pytest.skip("A1111 writes it as .pt alone")
    (torch.save if ending == "pt" else save_file)(content, file)
    found = imported([file], small, "cat").concept
    assert torch.equal(found.modifiers, rows[: 1 if kind == "a row" else 3])
    assert found.modifier_tokens == ("<new1>", "<new2>", "<new3>")[: len(found.modifiers)]
    assert not found.changed


def test_the_last_rows_of_dci_icos_table(small, tmp_path):
    rows = tokens_of(small, 2)
    table = torch.cat([small.text_encoder.token_table, rows])
    state = {n: torch.nn.Parameter(t) for n, t in state_of(small).items()}
    name = "transformer.text_model.embeddings.token_embedding.weight"
    torch.save({"state_dict": state | {name: table}}, tmp_path / "embeddings_gs-899.ckpt")
    found = imported([tmp_path / "embeddings_gs-899.ckpt"], small, "cat")
    assert torch.equal(found.concept.modifiers, rows)
    assert "last 2 rows" in " ".join(found.said)
    weights = found.concept.weights(small)
    for n, t in state.items():
        torch.testing.assert_close(weights["model.diffusion_model." + n], t.data, rtol=1e-3, atol=1e-3)


def test_a_compressed_delta_is_a_change(small, tmp_path):
    base = small.state_dict()
    names = [n for n in base if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    factors = {n: {"u": torch.randn(len(base[n]), 3), "v": torch.randn(3, base[n].shape[1])} for n in names}
    torch.save({"state_dict": {**factors, "embed": tokens_of(small, 1)}}, tmp_path / "compressed_delta.ckpt")
    weights = imported([tmp_path / "compressed_delta.ckpt"], small, "cat").concept.weights(small)
    for name, f in factors.items():
        torch.testing.assert_close(weights[name], base[name] + f["u"] @ f["v"])


def test_a_tuned_model_against_its_base(small, tmp_path):
    """DreamBooth changes any weight; one saved in fp16 differs only where it was tuned."""
    tuned = {n: t.clone() for n, t in small.state_dict().items()}
    changed = [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    ]
    for name in changed:
        tuned[name] += 0.25
    save_file({n: t.half() for n, t in tuned.items()}, tmp_path / "dreambooth.safetensors")
    found = imported([tmp_path / "dreambooth.safetensors"], small, "cat", "sks")
    assert set(found.concept.keys_values) == set(changed)
    assert found.concept.base == fingerprint(small)
    undo = found.concept.apply(small)
    after = {n: small.state_dict()[n].clone() for n in changed}
    undo()
    assert all(relative(after[n], tuned[n]) < 1e-3 for n in changed)
    less = imported([tmp_path / "dreambooth.safetensors"], small, "cat", "sks", which="cross-attention")
    assert set(less.concept.keys_values) == {changed[2]}
    with pytest.raises(UserError, match="give the base model that it was tuned from as model="):
        import_concept([tmp_path / "dreambooth.safetensors"], "cat", "sks", small.config)


# What the user must say, and what is refused.


def lora_file(small, tmp_path, **more):
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{place}.lora_down.weight": torch.randn(2, 64), f"{place}.lora_up.weight": torch.randn(64, 2), **more}
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_what_is_missing_is_asked_for(small, tmp_path):
    file = lora_file(small, tmp_path)
    with pytest.raises(UserError, match="give the ordinary word for it as class_noun="):
        imported([file], small)
    with pytest.raises(UserError, match="give the words that stand for it in prompts as trigger="):
        imported([file], small, "cat")
    with pytest.raises(UserError, match="has a text context 64 wide: give the model that it was made for as model="):
        import_concept([file], "cat", "sks")
    found = import_concept([file], "cat", "sks", small.config)
    assert "give it as model=" in found.said[-1]
    assert found.concept.base == ""
    prompt = parse_prompt("a V* on the sofa", found.concept.names)
    assert prompt.concept == "a sks cat on the sofa"
    assert prompt.concept_ids == parse_prompt("a sks cat on the sofa", found.concept.names).concept_ids
    assert len(prompt.concept_positions) == len(parse_prompt("a V* on the sofa", found.concept.names).concept_positions)
    save_file({"mycat": tokens_of(small, 1)}, tmp_path / "mycat.safetensors")
    with pytest.raises(UserError, match="trigger 'sks': the files bring 1 learned tokens"):
        imported([file, tmp_path / "mycat.safetensors"], small, "cat", "sks")


def test_an_exported_lora_alone_asks_for_its_tokens(small, tmp_path):
    export(concept_of(small), small, "lora", tmp_path)
    with pytest.raises(UserError, match="2 learned tokens lie in a file of their own"):
        imported([tmp_path / "mycat-lora.safetensors"], small)


PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WRONG = {
    "is a DoRA": {f"{PLACE}.dora_scale": torch.ones(64, 1)},
    "is a LoHa": {f"{PLACE}.hada_w1_a": torch.ones(4, 2)},
    "is a LoKr": {f"{PLACE}.lokr_w1": torch.ones(4, 2)},
    "Tucker factors": {f"{PLACE}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    "is a LoRA of Stable Diffusion XL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
    "which the model 'sd-v1' does not have": {"lora_unet_down_blocks_9_x.lora_down.weight": torch.ones(2, 64)},
    "lacks one of its two factors": {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)},
    "belongs to no LoRA that is understood": {"lora_unet_conv_in.something": torch.ones(1)},
    "it is made for another model": {f"{PLACE}.lora_up.weight": torch.ones(640, 2)},
    "holds numbers of another kind, NaN or infinite": {f"{PLACE}.lora_up.weight": torch.full((64, 2), float("nan"))},
    "alpha of 2 numbers": {f"{PLACE}.alpha": torch.ones(2)},
}


@pytest.mark.parametrize("words", WRONG)
def test_loras_that_cannot_be_used(small, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        imported([lora_file(small, tmp_path, **WRONG[words])], small, "cat", "sks")
    assert "\n" not in str(error.value)


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


HOSTILE = {
    "delta.ckpt": lambda evil: {"state_dict": {"embed": evil}},
    "delta.bin": lambda evil: {"unet": {}, "modifier_token": {"<new1>": evil}},
    "embeddings_gs-9.ckpt": lambda evil: {"state_dict": {"x": torch.zeros(1)}, "callbacks": evil},
    "pytorch_custom_diffusion_weights.bin": lambda evil: {"x.processor.to_k_custom_diffusion.weight": evil},
    "embedding.pt": lambda evil: {"string_to_param": {"*": evil}},
    "learned_embeds.bin": lambda evil: {"<new1>": evil},
    "lora.pt": lambda evil: {"lora_unet_x.lora_down.weight": evil},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_run_nothing(small, name, tmp_path):
    trace = tmp_path / "trace"
    torch.save(HOSTILE[name](Evil(trace)), tmp_path / name)
    with pytest.raises(UserError, match="is refused, nothing of it was run: it asks for posix.system") as error:
        imported([tmp_path / name], small, "cat", "sks")
    assert not trace.exists()
    assert "\n" not in str(error.value)


BROKEN = {
    "empty.ckpt": lambda file: file.write_bytes(b""),
    "page.safetensors": lambda file: file.write_text("<html>"),
    "page.pt": lambda file: file.write_text("<html>"),
    "list.pt": lambda file: torch.save([torch.ones(2)], file),
    "nothing.pt": lambda file: torch.save({}, file),
    "numbers.pt": lambda file: torch.save({1: torch.ones(2), 2: torch.ones(3)}, file),
    "scalar.pt": lambda file: torch.save({"string_to_param": {"*": 3}}, file),
    "wide.pt": lambda file: torch.save({"<new1>": torch.ones(7)}, file),
    "embed.ckpt": lambda file: torch.save({"state_dict": {"embed": torch.ones(1, 2, 3)}}, file),
    "values.ckpt": lambda file: torch.save({"state_dict": {"model.diffusion_model.a.attn2.to_k.weight": 3}}, file),
    "empty-list.bin": lambda file: torch.save({"unet": {}, "modifier_token": {"<new1>": []}}, file),
    "list.bin": lambda file: torch.save({"unet": {}, "modifier_token": {"<new1>": [torch.ones(64), torch.ones(128)]}}, file),
    "half.bin": lambda file: torch.save({"unet": {"a": torch.ones(2)}, "modifier_token": {}}, file),
    "custom.bin": lambda file: torch.save({"a.attn2.processor.to_k_custom_diffusion.weight": torch.ones(2)}, file),
    "control.safetensors": lambda file: save_file({"control_model.x": torch.ones(2, 2)}, file),
    "config.safetensors": lambda file: save_file(
        {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64, 1, 1),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(64, 2, 1, 1),
        },
        file,
        {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'},
    ),
    "json.safetensors": lambda file: save_file(
        {"unet.a.lora_A.weight": torch.ones(2)}, file, {"lora_adapter_metadata": "{"}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_in_one_line(small, name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(UserError) as error:
        imported([tmp_path / name], small, "cat", "sks")
    assert "\n" not in str(error.value)
    assert name in str(error.value)


# On the base model: LoRAs, and the strength of a concept.


@pytest.fixture
def fresh(small):
    import copy

    return copy.deepcopy(small)


def test_a_lora_on_the_base_is_its_change(fresh, small, tmp_path):
    concept = lora_concept(small)
    export(concept, small, "lora", tmp_path)
    known = fingerprint(fresh)
    add_loras(fresh, [f"{tmp_path / 'mycat-lora.safetensors'}:0.5"])
    for name, weight in concept.weights(small).items():
        base = small.state_dict()[name]
        assert relative(fresh.state_dict()[name] - base, 0.5 * (weight - base)) < 1e-3
    assert fingerprint(fresh) != known


def test_a_concept_over_loras_keeps_both_changes(fresh, small, tmp_path):
    style, concept = lora_concept(small, parts=("to_k", "conv1")), concept_of(small)
    export(style, small, "diff", tmp_path)
    above = on_loras(concept, fresh, [str(tmp_path / "mycat-diff.safetensors")])
    above.apply(fresh)
    base, own, further = small.state_dict(), concept.weights(small), style.weights(small)
    for name in own.keys() | further.keys():
        expected = own.get(name, base[name]) + further.get(name, base[name]) - base[name]
        assert relative(fresh.state_dict()[name], expected) < 1e-3, name


@pytest.mark.parametrize("strength", mostly_slow([0.0, 0.5, 1.0, 1.5], 0.5))
@pytest.mark.parametrize("make", [concept_of, lora_concept, lambda m: as_changes(concept_of(m), m)])
def test_a_strength_scales_the_change(small, make, strength):
    concept, base = make(small), small.state_dict()
    weights = scaled(concept, small, strength).weights(small)
    for name, weight in concept.weights(small).items():
        expected = base[name] + strength * (weight - base[name])
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [-0.1, 1.6])
def test_a_strength_out_of_range(small, strength):
    with pytest.raises(UserError, match="expected 0 .its tokens alone. to 1.5"):
        scaled(concept_of(small), small, strength)


def test_what_cannot_be_put_on_the_base(fresh, small, tmp_path):
    concept = concept_of(small)
    concept.save(tmp_path / "c.safetensors")
    export(concept, small, "adobe", tmp_path)
    for file, words in (
        ("c.safetensors", "is a concept file: give it as concept="),
        ("delta.ckpt", "expected a LoRA"),
        ("none.safetensors:0.5", "no LoRA .*none.safetensors: expected"),
    ):
        with pytest.raises(UserError, match=words):
            add_loras(fresh, [str(tmp_path / file)])
