"""SDXL's concepts in other programs' files: pairs of embeddings, two text encoders, diffusers' own loader."""

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from dci.concept.foreign.export import export
from dci.concept.foreign.importing import import_concept
from dci.concept.foreign.layers import Layers
from dci.finetuning.config import ConceptConfig, FinetuneConfig, TrainingConfig
from dci.finetuning.module import ICOTraining
from ldm.checkpoint import load_weights
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError


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
    from diffusers import StableDiffusionXLPipeline

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
    assert tiny_models.relative_error(found, expected) < 2e-3  # the file is fp16
    assert tiny_models.relative_error(before, expected) > 0.01


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
    for name in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
                 "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
                 "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                 "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"):  # fmt: skip
        assert name in layers.kohya
