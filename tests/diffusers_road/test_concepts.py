"""Concepts in pipelines: loaded, saved with the pipeline, beside LoRAs and textual inversions, and taken out again."""

import dataclasses

import diffusers
import pytest
import torch
from calls import latents, seeded
from diffusers_world import world
from helpers import mostly_slow
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_models import relative_error

from dci.concept.foreign.export import export
from dci.concept.low_rank import compress
from dci.diffusers import DCIPipeline
from dci.diffusers.model import encoders
from ldm.errors import UserError


@pytest.fixture(scope="module", params=mostly_slow(["sd1", "sd2", "xl"], "sd1"))
def family(request):
    return world(request.param)


@pytest.fixture(scope="module")
def sd1():
    return world("sd1")


def state(pipe):
    """Everything that a pipeline saves: weights, vocabulary and configurations."""
    tensors = {
        f"{part}.{n}": t.clone()
        for part in ("unet", "text_encoder", "text_encoder_2", "vae")
        if part in pipe.components
        for n, t in getattr(pipe, part).state_dict().items()
    }
    pairs = encoders(pipe)
    configs = [*(encoder.config.to_dict() for _, encoder in pairs), dict(pipe.unet.config)]
    known = [{name: value for name, value in config.items() if name != "_name_or_path"} for config in configs]
    return tensors, ([tokenizer.get_vocab() for tokenizer, _ in pairs], *known, [len(tokenizer) for tokenizer, _ in pairs])


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]


def style_lora(family, folder):
    """A LoRA of the UNet, as training saves it with diffusers."""
    plain = family.plain()
    unet = plain.unet
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    type(plain).save_lora_weights(folder, get_peft_model_state_dict(unet))
    return folder


def test_unloading_is_exact(family):
    pipe = family.pipe(concept=False)
    before = state(pipe)
    pipe.load_concept(family.file)
    assert state(pipe)[1][-1] == [number + 2 for number in before[1][-1]]
    assert pipe.concept.class_noun == "dog"
    latents(pipe)
    pipe.unload_concept()
    assert_same(state(pipe), before)
    assert pipe.concept is None
    with pytest.raises(UserError, match="load_concept"):
        latents(pipe)
    pipe.load_concept(family.file)  # and again
    pipe.unload_concept()
    assert_same(state(pipe), before)


@pytest.mark.slow
def test_textual_inversions_before_and_after(sd1):
    """They go on working beside the concept, and are all that is left without it."""
    hat, cap = torch.randn(2, 64), torch.randn(1, 64)
    pipe, other = sd1.pipe(concept=False), sd1.pipe(concept=False)
    pipe.load_textual_inversion(hat, token="<hat>")
    pipe.load_concept(sd1.file)
    pipe.load_textual_inversion(cap, token="<cap>")
    branches = pipe.parse("a <hat> on a V* dog")
    assert branches.concept_positions == (5, 6, 7)  # "a", the hat's two tokens, "on" and "a" come before
    assert branches.auxiliary_positions == (5,)
    assert not torch.equal(latents(pipe, "a V* dog with a <hat>"), latents(pipe, "a V* dog with a <cap>"))
    pipe.unload_concept()
    other.load_textual_inversion(hat, token="<hat>")
    other.load_textual_inversion(cap, token="<cap>")
    assert_same(state(pipe), state(other))
    prompt = "a dog with a <cap> and a <hat>"
    assert torch.equal(latents(pipe, prompt, dci=False), latents(other, prompt, dci=False))


@pytest.mark.slow
def test_tokens_that_are_there_or_gone(sd1):
    pipe = sd1.pipe(concept=False)
    pipe.load_textual_inversion(torch.randn(1, 64), token="<new1>")
    before = state(pipe)
    with pytest.raises(UserError, match="has an entry '<new1>' already"):
        pipe.load_concept(sd1.file)
    assert_same(state(pipe), before)
    pipe = sd1.pipe()
    pipe.unload_textual_inversion()
    with pytest.raises(UserError, match="has lost the concept's <new1>, <new2>"):
        latents(pipe)
    pipe.unload_concept()
    assert_same(state(pipe), state(sd1.plain()))


@pytest.mark.slow
def test_another_base_is_refused(sd1, tmp_path):
    pipe = sd1.pipe(concept=False)
    before = state(pipe)
    other = dataclasses.replace(sd1.concept, base="0123456789abcdef", base_name="another")
    with pytest.raises(UserError, match="'another' .* but the pipeline holds another"):
        pipe.load_concept(other)
    with pytest.raises(UserError, match="does not fit"):
        pipe.load_concept(dataclasses.replace(other, modifiers=torch.zeros(2, 7)), check_base=False)
    assert_same(state(pipe), before)
    pipe.load_concept(other, check_base=False)
    assert torch.equal(latents(pipe), latents(sd1.pipe()))
    with pytest.raises(UserError, match="loaded already"):
        pipe.load_concept(sd1.file)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_is_known_in_half_precision(sd1, dtype):
    pipe = DCIPipeline.from_pretrained(sd1.folder, torch_dtype=dtype)
    before = state(pipe)
    pipe.load_concept(sd1.file)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == dtype
    pipe.unload_concept()
    assert_same(state(pipe), before)
    if dtype == torch.bfloat16:  # rounded too far to tell, where the file is not at hand
        pipe.register_to_config(_name_or_path="elsewhere")
        with pytest.raises(UserError, match="in fp32 or fp16"):
            pipe.load_concept(sd1.file)


@pytest.mark.slow
def test_a_cast_in_between_is_no_change(sd1):
    pipe = sd1.pipe().to(torch.float16)
    pipe.unload_concept()
    assert_same(state(pipe), state(sd1.plain().to(torch.float16)))


@pytest.mark.slow
def test_a_saved_pipeline_holds_the_concept(family, tmp_path):
    pipe = family.pipe()
    expected = latents(pipe, dci=False)
    pipe.save_pretrained(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain) is type(family.plain())
    found = plain("a <new1> <new2> dog on the beach", output_type="latent", generator=seeded(), num_inference_steps=4)
    assert torch.equal(found.images, expected)
    pipe.unload_concept()
    pipe.save_pretrained(tmp_path / "without")
    assert_same(state(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "without")), state(family.plain()))


@pytest.mark.slow
def test_a_style_lora_of_sdxl(tmp_path):
    xl = world("xl")
    pipe = xl.pipe()
    alone = latents(pipe)
    pipe.load_lora_weights(style_lora(xl, tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert relative_error(latents(pipe), alone) > 1e-3
    assert relative_error(latents(pipe, agg_lambda=-1e6), latents(pipe, dci=False)) < 1e-5
    pipe.unload_lora_weights()
    pipe.unload_concept()
    assert_same(state(pipe), state(xl.plain()))


@pytest.mark.slow
def test_a_style_lora_beside_the_concept(sd1, tmp_path):
    """Loaded before or after, scaled, and taken out again; fused, the concept cannot be taken out."""
    style, style_file = style_lora(sd1, tmp_path), "pytorch_lora_weights.safetensors"
    pipe, plain = sd1.pipe(), sd1.plain()
    alone = latents(pipe)
    pipe.load_lora_weights(style, weight_name=style_file)
    both = latents(pipe)
    assert relative_error(both, alone) > 1e-3
    assert relative_error(latents(pipe, agg_lambda=-1e6), latents(pipe, dci=False)) < 1e-5
    half = latents(pipe, cross_attention_kwargs={"scale": 0.5})
    assert relative_error(half, both) > 1e-4
    assert relative_error(half, alone) > 1e-4
    assert relative_error(latents(pipe, cross_attention_kwargs={"scale": 0.0}), alone) < 1e-5
    plain.load_lora_weights(style, weight_name=style_file)
    other = DCIPipeline.from_pipe(plain)
    other.load_concept(sd1.file)
    assert torch.equal(latents(other), both)
    base = latents(other, auxiliary_weights="base", agg_lambda=1.0)
    assert relative_error(base, latents(other, agg_lambda=1.0)) > 1e-6
    other.unload_concept()
    other.unload_lora_weights()
    assert_same(state(other), state(sd1.plain()))
    pipe.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        pipe.unload_concept()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(latents(pipe), alone) < 1e-5


@pytest.mark.slow
def test_pipelines_of_one_unet_share_its_concept(sd1):
    pipe = sd1.pipe()
    other = DCIPipeline.from_pipe(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    assert other.concept is pipe.concept
    other.unload_concept()
    assert pipe.concept is None
    with pytest.raises(UserError, match="no component 'schedular'"):
        DCIPipeline.from_pipe(pipe, schedular=pipe.scheduler)
    scheduler = sd1.scheduler("EulerDiscreteScheduler")
    assert DCIPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler


@pytest.mark.slow
def test_low_rank_concepts_and_strengths(sd1, tmp_path):
    small = compress(sd1.concept, sd1.base, rank=4, most_megabytes=float("inf")).concept
    pipe = sd1.pipe(concept=False)
    pipe.load_concept(small)
    name = next(iter(small.low_rank))
    expected = small.weights(sd1.base)[name]
    assert any(torch.equal(p, expected) for n, p in pipe.unet.named_parameters() if n.endswith("attn2.to_k.weight"))
    pipe.unload_concept()
    assert_same(state(pipe), state(sd1.plain()))
    pipe.load_concept(sd1.file, strength=0.0)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), sd1.plain().unet.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("sd1", "lora"), ("sd1", "diffusers"), ("xl", "lora")])
def test_files_of_other_programs(tmp_path, name, form):
    """What our export writes for them is read back; fp16 rounds it."""
    family = world(name)
    done = export(family.concept, family.base, form, tmp_path, bundle=form == "lora")
    files = [file for file in done.files if file.suffix in (".safetensors", ".bin")]
    files = files[:1] if form == "lora" else files
    pipe = family.pipe(concept=False)
    pipe.load_concept(*files, class_noun="dog")
    assert relative_error(latents(pipe), latents(family.pipe())) < 1e-2
    pipe.unload_concept()
    assert_same(state(pipe), state(family.plain()))


@pytest.mark.slow
def test_several_concepts_in_one_file(sd1):
    names = tuple(type(sd1.concept.names[0])((token,), noun) for token, noun in (("<new1>", "dog"), ("<new2>", "cat")))
    pipe = sd1.pipe(concept=False)
    pipe.load_concept(dataclasses.replace(sd1.concept, names=names))
    branches = pipe.parse("a V1* and a V2* on the beach")
    assert branches.concept == "a <new1> dog and a <new2> cat on the beach"
    assert branches.concept_positions == (1, 2, 5, 6)
    assert relative_error(latents(pipe, "a V1* and a V2*"), latents(pipe, "a V1* and a V2*", dci=False)) > 1e-5
    assert torch.equal(latents(pipe, "V2* asleep", dci=False), latents(pipe, "<new2> cat asleep", dci=False))


@pytest.mark.slow
def test_fused_and_quantised_weights_are_refused(sd1):
    pipe = sd1.pipe(concept=False)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        pipe.load_concept(sd1.file)
    pipe.unfuse_qkv_projections(vae=False)
    pipe.load_concept(sd1.file)
    expected = latents(pipe)
    pipe.fuse_qkv_projections(vae=False)
    assert relative_error(latents(pipe), expected) < 1e-5
    pipe = sd1.pipe(concept=False)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="is quantised: load the concept into the pipeline first"):
        pipe.load_concept(sd1.file)
