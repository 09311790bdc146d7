"""SDXL's concepts in other programs' files: pairs of embeddings, two text encoders, diffusers' own loader."""

import dataclasses

import foreign_models
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_models import relative_error

from dci.concept.foreign.export import export
from dci.concept.foreign.importing import import_concept
from dci.concept.foreign.layers import Layers
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import sampling_options
from dci.dual_branch.sampling import BranchContexts, sample_latents
from dci.finetuning.config import ConceptConfig, FinetuneConfig, TrainingConfig
from dci.finetuning.module import ICOTraining
from ldm.checkpoint import load_model, load_weights
from ldm.conditioning import ImageSize
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.formats.diffusers_export import write_folder


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(4)
    return tiny_models.make(tiny_models.small_xl())


@pytest.fixture(scope="module")
def model(theirs):
    with torch.device("meta"):
        ours = LatentDiffusion(theirs.config)
    load_weights(ours, theirs.state, "random weights")
    return ours.eval()


@pytest.fixture(scope="module")
def concept(model):
    """A low-rank concept that changes everything it may."""
    config = FinetuneConfig(concept=ConceptConfig(class_noun="dog"), training=TrainingConfig(lora_rank=4))
    module = ICOTraining(model, config, images=1)
    for factor in (*module.low_rank.u, *module.low_rank.v):
        factor.data = 0.5 * torch.randn(factor.shape)
    return module.concept()


@torch.no_grad()
def test_diffusers_draws_what_we_draw_from_a_lora(concept, model, theirs, tmp_path):
    done = export(concept, model, "lora", tmp_path)
    (file,) = [f for f in done.files if f.name.endswith("lora.safetensors")]
    pipeline = StableDiffusionXLPipeline(theirs.vae, theirs.text, theirs.text_2, None, None, theirs.unet, None)
    x, t, context, pooled = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 96), torch.randn(1, 48)
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    before = theirs.unet(x, t, context, **more).sample
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    found = theirs.unet(x, t, context, **more).sample
    pipeline.unload_lora_weights()
    undo = concept.apply(model)
    expected = model.unet(x, t, context, vector=model.text_encoder.vector(pooled, sizes))
    undo()
    assert relative_error(found, expected) < 2e-3  # the file is fp16
    assert relative_error(before, expected) > 0.01


@pytest.mark.parametrize("to", ["lora", "diff", "adobe"])
def test_what_is_exported_comes_back(concept, model, to, tmp_path):
    done = export(concept, model, to, tmp_path)
    weights = [f for f in done.files if f.stem.endswith(to) or f.name == "delta.bin"]
    tokens = [] if to == "adobe" else [f for f in done.files if f.suffix == ".safetensors" and f not in weights]
    found = import_concept([*weights, *tokens], "dog", config=model.config, load=lambda: model).concept
    torch.testing.assert_close(found.modifiers, concept.modifiers)
    expected = concept.weights(model)
    for name, weight in found.weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=2e-3)


def test_tokens_are_written_in_two_halves_and_bundled(concept, model, tmp_path):
    done = export(concept, model, "lora", tmp_path, bundle=True)
    (file,) = [f for f in done.files if f.stem == done.words[0]]
    halves = load_file(file)
    assert {name: tuple(half.shape) for name, half in halves.items()} == {"clip_l": (2, 32), "clip_g": (2, 64)}
    torch.testing.assert_close(torch.cat([halves["clip_l"], halves["clip_g"]], dim=1), concept.modifiers)
    bundled = load_file(next(f for f in done.files if f.name.endswith("lora.safetensors")))
    names = {name for name in bundled if name.startswith("bundle_emb.")}
    assert names == {f"bundle_emb.{done.words[0]}.{half}" for half in ("clip_l", "clip_g")}


@pytest.mark.slow
def test_custom_diffusions_delta_has_a_list_of_two_vectors(concept, model, tmp_path):
    """As its scripts for SDXL write and read it; and a text encoder that was trained as a whole comes along."""
    export(concept, model, "adobe", tmp_path)
    delta = torch.load(tmp_path / "delta.bin", weights_only=True)
    for token, row in zip(concept.modifier_tokens, concept.modifiers, strict=True):
        first, second = delta["modifier_token"][token]
        assert (first.shape, second.shape) == ((32,), (64,))
        torch.testing.assert_close(torch.cat([first, second]), row)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in delta["unet"]
    theirs, expected = tiny_models.make(model.config), {}
    for part, network, prefix in (
        ("text_encoder", theirs.text, "0.transformer"),
        ("text_encoder_2", theirs.text_2, "1.model"),
    ):
        delta[part] = network.state_dict()
        expected |= {n: t for n, t in theirs.state.items() if n.startswith(f"conditioner.embedders.{prefix}.")}
    torch.save(delta, tmp_path / "text.bin")
    found = import_concept([tmp_path / "text.bin"], "dog", config=model.config, load=lambda: model).concept
    weights = found.weights(model)
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith("logit_scale")}
    assert expected.keys() == {name for name in weights if name.startswith("conditioner.")}
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def exact():
    """A model with weights that fp16 holds, a concept, first noise, and latents of it."""
    torch.manual_seed(5)
    model = foreign_models.model_of(tiny_models.small_xl())
    concept, noise = foreign_models.concept_of(model), foreign_models.first_noise(model)
    before, undo = our_latents(model, concept, noise), concept.apply(model)
    latents = our_latents(model, concept, noise)
    undo()
    assert relative_error(before, latents) > 1e-2
    return model, concept, noise, latents


@torch.no_grad()
def our_latents(model, concept, noise):
    prompt, size = parse_prompt("photo of a V* cat", concept.names), ImageSize((32, 32), (0, 0), (32, 32)).row()
    options = sampling_options(model, steps=3, scale=5.0, eta=0.0, solver="ddim")
    contexts = BranchContexts.of(model, concept, [prompt], "", size)
    return sample_latents(model, contexts, None, None, options, (lambda: noise, None))


def their_latents(pipeline, noise, card):
    """Latents of diffusers with what a card says to load: its code is run, but for the last line, which samples."""
    *load, last = card.split("```python\n")[1].split("```")[0].strip().splitlines()
    names = {"pipe": pipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    exec("\n".join(load), names)
    pipeline = names["pipe"]
    pipeline.set_progress_bar_config(disable=True)
    assert last == 'pipe("photo of mycat cat on the beach")'
    sizes = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 5.0}
    return pipeline("photo of a mycat cat", latents=noise, output_type="latent", **sizes).images


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("to", "options"), [("lora", {}), ("checkpoint", {"as_folder": True})])
def test_what_the_card_says_makes_our_latents_in_diffusers(exact, to, options, tmp_path, monkeypatch):
    model, concept, noise, latents = exact
    write_folder(model.state_dict(), model.config, tmp_path / "base")
    export(concept, model, to, tmp_path / "out", **options)
    monkeypatch.chdir(tmp_path / "out")
    base = None if options else StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    found = their_latents(base, noise, (tmp_path / "out/README.md").read_text())
    assert relative_error(found, latents) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_of_ours_is_read_by_diffusers_and_by_us(exact, tmp_path):
    model = exact[0]
    write_folder(model.state_dict(), model.config, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    x, t, context, pooled = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 96), torch.randn(1, 48)
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    theirs = pipeline.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    ours = model.unet(x, t, context, vector=model.text_encoder.vector(pooled, sizes))
    assert relative_error(ours, theirs) < 1e-5
    context, _, pooled, _ = pipeline.encode_prompt("a dog on the beach", do_classifier_free_guidance=False)
    found = model.text_encoder.condition(model.text_encoder.tokenize(["a dog on the beach"]), None, sizes)
    assert relative_error(found.tensor, context) < 1e-5
    assert relative_error(found.vector[:, :48], pooled) < 1e-5
    assert pipeline.vae.config.force_upcast and pipeline.config.force_zeros_for_empty_prompt
    again = load_model(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.config == dataclasses.replace(model.config, checkpoint=None)


def test_a_single_file_has_the_published_names(exact, theirs, tmp_path):
    """Those that diffusers' own converter takes (`tiny_models.make` is made by it), and open_clip's."""
    model, concept, noise, latents = exact
    export(concept, model, "checkpoint", tmp_path)
    state = load_file(tmp_path / "mycat-checkpoint.safetensors")
    assert state.keys() == theirs.state.keys() - {"conditioner.embedders.1.model.logit_scale"}
    ours, published = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (state, theirs.state))
    assert ours.items() <= published.items()
    merged = load_model(tiny_models.write_yaml(model.config, tmp_path / "m.yaml"), tmp_path / "mycat-checkpoint.safetensors")
    assert relative_error(our_latents(merged, concept, noise), latents) < 1e-4


def test_half_an_embedding_is_refused(model, tmp_path):
    save_file({"clip_g": torch.randn(1, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="an embedding of SDXL that is not whole: expected clip_l and clip_g"):
        import_concept([tmp_path / "half.safetensors"], "dog", config=model.config)


@pytest.mark.parametrize("names", [("lora_te1_", "lora_te2_"), ("text_encoder.", "text_encoder_2.")])
def test_changes_of_both_text_encoders_are_read(model, names, tmp_path):
    tensors = {}
    for prefix, width in zip(names, (32, 64), strict=True):
        layer = "text_model.encoder.layers.1.self_attn.out_proj"
        layer = layer.replace(".", "_") if prefix.startswith("lora") else layer
        down, up = (".lora_down", ".lora_up") if prefix.startswith("lora") else (".lora_A", ".lora_B")
        tensors |= {
            f"{prefix}{layer}{down}.weight": torch.randn(2, width),
            f"{prefix}{layer}{up}.weight": torch.randn(width, 2),
        }
    save_file(tensors, tmp_path / "te.safetensors")
    found = import_concept([tmp_path / "te.safetensors"], "dog", "sks", config=model.config).concept
    assert set(found.low_rank) == {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.out_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.out_proj.weight",
    }


def test_layers_of_the_full_size_have_kohyas_names():
    from ldm.formats import presets

    layers = Layers.of(presets.sdxl())
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
    ):
        assert name in layers.kohya
