"""What a call asks for and does not get is said in a line, as our own sampling does; negative prompts name the concept."""

import functools
import warnings

import calls
import pytest
import torch
from calls import PROMPT, picture
from diffusers_world import world

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import mentions, negative_ids
from ldm.errors import Note, UserError

latents = functools.partial(calls.latents, num_inference_steps=3)


@pytest.fixture(scope="module")
def pipe():
    return world("sd1").pipe()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negative_prompt": "a cat", "guidance_scale": 1.0}, "the negative prompt has no effect: guidance_scale 1 is"),
        ({"negative_prompt": ["a cat"], "prompt": [PROMPT], "guidance_scale": 0.5}, "guidance_scale 0.5 is no guidance"),
        ({"prompt": PROMPT + " (red:1.4)"}, "weighs nothing"),
        ({"negative_prompt": "<lora:style:0.8>"}, "loads nothing"),
        ({"agg_time": 0.01}, "the first timestep is 667, and both branches run above 990: this is plain sampling"),
        ({"auxiliary_latents": torch.zeros(1, 4, 16, 16), "shared_noise": True}, "auxiliary_latents has no effect"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_notes(pipe, options, said):
    with pytest.warns(Note, match=said):
        latents(pipe, **options)


def test_a_line_that_there_is_no_dual_step_for_an_image_hardly_changed():
    pipe = world("sd1").pipe("StableDiffusionImg2ImgPipeline")
    with pytest.warns(Note, match="the first timestep is .* raise agg_time"):
        latents(pipe, image=picture(), strength=0.4, agg_time=0.3)
    with pytest.raises(UserError, match="strength leaves none of the steps"):
        latents(pipe, image=picture(), strength=0.1)


@pytest.mark.parametrize("options", [{}, {"agg_time": 0}, {"dci": False}, {"negative_prompt": "a cat", "guidance_scale": 2}])
def test_nothing_is_said_without_a_reason(pipe, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        latents(pipe, **options)


@pytest.mark.slow
def test_a_concept_that_is_not_loaded():
    pipe = world("sd1").pipe(concept=False)
    with pytest.warns(Note, match=r"'V\*' names a concept, and there is none"):
        latents(pipe, dci=False)


@pytest.mark.parametrize("dci", [True, False])
def test_negative_prompts_that_name_the_concept(pipe, dci):
    """V* is short for its tokens there too, in lists and by themselves; another concept's name is refused."""
    written = latents(pipe, negative_prompt="a <new1> <new2> dog, blurred", dci=dci)
    assert torch.equal(latents(pipe, negative_prompt="a V*, blurred", dci=dci), written)
    assert torch.equal(latents(pipe, [PROMPT], negative_prompt=["a {} dog, blurred"], dci=dci), written)
    assert not torch.equal(latents(pipe, negative_prompt="a dog, blurred", dci=dci), written)
    with pytest.raises(UserError, match="V2"):
        latents(pipe, negative_prompt="a V2* dog", dci=dci)


def test_words_that_merely_contain_a_trigger():
    """A trigger word of the vocabulary is named as a word of its own."""
    names = [ConceptName(("sks",), "dog")]
    assert mentions("a sks dog", names)
    assert not mentions("two desksides", names)
    assert negative_ids("two desksides", names) is None
