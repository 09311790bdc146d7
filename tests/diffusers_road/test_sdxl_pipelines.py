"""SDXL's pipelines: two text encoders, a pooled text, an image's size; the rest is as in the other families."""

import dataclasses
import functools

import calls
import diffusers
import pytest
import torch
from calls import INTO, PROMPT, controlnet, half_mask, picture, seeded, with_and_without
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers_world import world
from tiny_models import relative_error

from dci.diffusers import DCIPipeline
from ldm.errors import UserError
from ldm.tokenizer import END

pytestmark = pytest.mark.slow
latents = functools.partial(calls.latents, num_inference_steps=3, agg_time=1)
UNIONS = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4, "num_control_type": 6}


@pytest.fixture(scope="module")
def xl():
    return world("xl")


@pytest.fixture(scope="module")
def pipe(xl):
    return xl.pipe()


XL = "StableDiffusionXL"
CONTROL = {"control_image": picture(1)}
UNION = {"control_image": [picture(1)], "control_mode": [2]}
KINDS = {
    "text": (XL + "Pipeline", None, {"negative_original_size": (16, 16), "negative_target_size": (32, 32)}),
    "image": (XL + "Img2ImgPipeline", None, {"image": picture(), "strength": 0.9}),
    "inpaint": (XL + "InpaintPipeline", None, INTO | {"strength": 0.8, "guidance_rescale": 0.5}),
    "control": (XL + "ControlNetPipeline", ControlNetModel, {"image": picture(1)}),
    "control, guess": (XL + "ControlNetPipeline", ControlNetModel, {"image": picture(1), "guess_mode": True}),
    "control, image": (XL + "ControlNetImg2ImgPipeline", ControlNetModel, CONTROL | {"image": picture(), "strength": 0.9}),
    "control, inpaint": (XL + "ControlNetInpaintPipeline", ControlNetModel, INTO | CONTROL | {"guidance_rescale": 0.5}),
    "union": (XL + "ControlNetUnionPipeline", ControlNetUnionModel, UNION),
    "union, image": (XL + "ControlNetUnionImg2ImgPipeline", ControlNetUnionModel, UNION | {"image": picture()}),
    "union, inpaint": (
        XL + "ControlNetUnionInpaintPipeline",
        ControlNetUnionModel,
        UNION | {"image": picture(), "mask_image": half_mask(), "height": 32, "width": 32},
    ),
}


def made(pipe, kind):
    """A pipeline of another kind on the same networks, which hold the concept."""
    name, network, options = KINDS[kind]
    components = {} if network is None else {"controlnet": controlnet(pipe.unet, network, **UNIONS)}
    other = DCIPipeline.from_pipe(getattr(diffusers, name)(**pipe.components, **components))
    other.set_progress_bar_config(disable=True)
    return other, options


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(pipe, kind):
    """A weight of one is the pipeline by itself; DCI is something else; separate guidance is another thing again."""
    pipe, options = made(pipe, kind)
    found, plain, options = with_and_without(latents, pipe, options)
    assert 1e-6 < relative_error(found, plain) < 0.5
    if "guess" not in kind:
        assert not torch.equal(found, latents(pipe, shared_guidance=False, **options))


def rows_of_unet(pipe, **options):
    """What the UNet is conditioned on in its first call."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    latents(pipe, **options)
    hook.remove()
    return seen[0]["encoder_hidden_states"], seen[0]["added_cond_kwargs"]


@pytest.mark.parametrize("shared", [True, False])
def test_each_row_has_its_own_texts_and_the_image_has_one_size(xl, pipe, shared):
    """Unconditional rows are zeros where no negative prompt is given, as the model has it."""
    branches = pipe.parse(PROMPT)
    (concept, _, pooled, _), (auxiliary, _, other, _) = (
        pipe.encode_prompt(text, do_classifier_free_guidance=False) for text in (branches.concept, branches.auxiliary)
    )
    sizes = {"original_size": (64, 48), "crops_coords_top_left": (4, 8), "target_size": (32, 32)}
    contexts, added = rows_of_unet(pipe, shared_guidance=shared, **sizes)
    unconditional = [torch.zeros_like(concept)] if shared else [torch.zeros_like(concept)] * 2
    nothing, *more = unconditional
    assert torch.equal(contexts, torch.cat([nothing, concept, *more, auxiliary]))
    zeros = torch.zeros_like(pooled)
    assert torch.equal(added["text_embeds"], torch.cat([zeros, pooled, *[zeros for _ in more], other]))
    assert relative_error(other, pooled) > 1e-2
    assert added["time_ids"].tolist() == [[64, 48, 4, 8, 32, 32]] * len(contexts)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    contexts, added = rows_of_unet(pipe)
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert contexts[0].abs().max() > 0
    assert added["text_embeds"][0].abs().max() > 0


def test_texts_are_pooled_at_their_end(xl):
    """Published configurations have an id that makes transformers take the largest one; added tokens' are larger."""
    pipe = xl.pipe(concept=False)
    assert pipe.text_encoder_2.config.eos_token_id == 2
    pipe.load_concept(xl.file)
    pooled = pipe.encode_prompt(pipe.parse(PROMPT).concept, do_classifier_free_guidance=False)[2]
    ids = torch.tensor([xl.concept_ids(PROMPT)])
    expected = xl.model.text_encoder.condition(ids, xl.concept.modifiers, torch.zeros(1, 6)).vector[:, : pooled.shape[1]]
    assert relative_error(pooled, expected) < 1e-5
    assert pipe.text_encoder_2.config.eos_token_id == END
    pipe.unload_concept()
    assert pipe.text_encoder_2.config.eos_token_id == 2


def test_the_second_prompt(pipe):
    """The second encoder may read another prompt, if the concept has the same place in it."""
    found = latents(pipe, prompt_2="a V* dog painted in oil on canvas")
    assert relative_error(found, latents(pipe)) > 1e-3
    plain = latents(pipe, prompt_2="a V* dog painted in oil on canvas", dci=False)
    assert relative_error(latents(pipe, prompt_2="a V* dog painted in oil on canvas", agg_lambda=-1e6), plain) < 1e-5
    with pytest.raises(UserError, match="names the concept elsewhere"):
        latents(pipe, prompt_2="an oil painting of a V* dog")
    with pytest.raises(UserError, match="does not name the concept"):
        latents(pipe, prompt_2="an oil painting")
    with pytest.raises(UserError, match="1 prompts, 2 in prompt_2"):
        latents(pipe, prompt_2=[PROMPT, PROMPT])


def test_embeddings_in_place_of_prompts(pipe):
    branches = pipe.parse(PROMPT)
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(branches.concept)
    given = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "branch_prompts": branches,
    }
    found = latents(pipe, None, **given)
    assert torch.equal(found, latents(pipe))
    auxiliary, _, other, _ = pipe.encode_prompt(branches.auxiliary)
    own = {"auxiliary_prompt_embeds": auxiliary, "auxiliary_pooled_prompt_embeds": other}
    assert torch.equal(latents(pipe, None, **given, **own), found)
    assert not torch.equal(latents(pipe, None, **given, **own | {"auxiliary_pooled_prompt_embeds": 2 * other}), found)
    with pytest.raises(UserError, match="auxiliary_pooled_prompt_embeds"):
        latents(pipe, None, **given, auxiliary_prompt_embeds=auxiliary)


def test_going_on_with_latents(pipe):
    """One pipeline may end early and another go on: the auxiliary branch goes on from the same latents."""
    into = made(pipe, "image")[0]
    half = latents(pipe, dci=False, denoising_end=0.3, num_inference_steps=4)
    options = {"image": half, "denoising_start": 0.3, "num_inference_steps": 4}
    plain = latents(into, dci=False, **options)
    assert relative_error(latents(into, agg_lambda=-1e6, **options), plain) < 1e-5
    assert relative_error(latents(into, **options), plain) > 1e-7
    options = {"image": picture(), "strength": 0.7, "latents": half}
    plain = latents(into, dci=False, **options)
    assert relative_error(latents(into, agg_lambda=-1e6, **options), plain) < 1e-5
    other = latents(into, auxiliary_latents=torch.randn(1, 4, 16, 16, generator=seeded()), **options)
    assert not torch.equal(latents(into, **options), other)


def test_textual_inversions_belong_to_both_encoders(xl):
    pipe = xl.pipe()
    pairs = zip((pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2), strict=True)
    for number, (encoder, tokenizer) in enumerate(pairs):
        if number:
            with pytest.raises(UserError, match="two tokenizers cut"):
                pipe.parse("a <hat> on a V* dog")
        width = encoder.config.hidden_size
        pipe.load_textual_inversion(torch.randn(2, width), token="<hat>", text_encoder=encoder, tokenizer=tokenizer)
    assert pipe.parse("a <hat> on a V* dog").concept_positions == (5, 6, 7)
    assert latents(pipe, "a <hat> on a V* dog").isfinite().all()


def test_other_bases_are_refused(xl):
    pipe = xl.pipe(concept=False)
    with pytest.raises(UserError, match="holds another"):
        pipe.load_concept(dataclasses.replace(xl.concept, base="0123456789abcdef", base_name="another"))
    with pytest.raises(UserError, match="holds another"):
        pipe.load_concept(world("sd1").file)
    with pytest.raises(UserError, match="does not fit"):
        pipe.load_concept(world("sd1").file, check_base=False)
    with pytest.raises(UserError, match="holds another"):
        world("sd1").pipe(concept=False).load_concept(xl.file)


def test_the_refiner_is_refused(xl):
    plain = xl.plain()
    parts = {**plain.components, "text_encoder": None, "tokenizer": None}
    refiner = DCIPipeline.from_pipe(diffusers.StableDiffusionXLImg2ImgPipeline(**parts))
    with pytest.raises(UserError, match="has no tokenizer, text_encoder.*refiner"):
        refiner.load_concept(xl.file)


def test_the_base_is_known_in_bf16(xl):
    pipe = DCIPipeline.from_pretrained(xl.folder, torch_dtype=torch.bfloat16)
    pipe.load_concept(xl.file)
    pipe.set_progress_bar_config(disable=True)
    assert relative_error(latents(pipe).float(), latents(xl.pipe())) < 0.2
