"""DCI with a concept from another program's LoRA, which changes more than keys and values."""

import copy
from dataclasses import replace

import pytest
import torch
from foreign_models import lora_concept
from helpers import ROOT
from PIL import ImageChops

from dci import Pipeline
from dci.concept.foreign.export import export
from dci.concept.foreign.importing import import_concept
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.sampling import SampleRequest, sample

PARTS = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "conv1", "fc1", "q_proj", "out_proj")


@pytest.fixture(scope="module")
def lora(tiny_base, tmp_path_factory):
    """A LoRA's file for the embedded model, of the UNet with its convolutions and of the text encoder."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("lora")
    export(lora_concept(tiny_base, parts=PARTS), tiny_base, "lora", folder)
    return folder / "mycat-lora.safetensors"


@pytest.fixture(scope="module")
def imported(tiny_base, lora):
    """(model with the LoRA, the concept, the weights that it replaced)"""
    model = copy.deepcopy(tiny_base)
    # Its header tells of learned tokens in another file; the trigger word stands for them.
    concept = import_concept([lora], "cat", "sks", model.config, lambda: model).concept
    replaced = concept.replaced(model)
    concept.apply(model)
    return model, concept, replaced


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["finetuned", "base"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_weight_of_one_is_plain_sampling(imported, weights, shared):
    model, concept, replaced = imported
    prompt = parse_prompt("a V* cat on the beach", concept.names)
    options = sampling_options(model, steps=10)
    request = SampleRequest(prompt, [0], options, base=replaced)
    plain = sample(model, concept, request)
    dual = dual_branch(model, agg_lambda=-1e6, shared_guidance=shared, auxiliary_weights=weights)
    assert (sample(model, concept, replace(request, dual=dual)) - plain).abs().max() < 1e-4
    dual = dual_branch(model, auxiliary_weights=weights, shared_guidance=shared)
    assert (sample(model, concept, replace(request, dual=dual)) - plain).abs().max() > 0.02


@pytest.mark.slow
def test_a_pipeline_of_a_foreign_file_equals_the_concept_file_imported_from_it(imported, lora, tmp_path):
    """Also with a trigger in place of V*, and not with the concept at half its strength."""
    imported[1].save(tmp_path / "sks.safetensors")
    tiny = ROOT / "configs/model/tiny.yaml"
    own = Pipeline.load(tmp_path / "sks.safetensors", tiny, device="cpu")("a V* cat on the beach", steps=4)[0]
    foreign = Pipeline.load(lora, tiny, device="cpu", class_noun="cat", trigger="sks")("a sks cat on the beach", steps=4)[0]
    assert not ImageChops.difference(own, foreign).getbbox()
    half = Pipeline.load(tmp_path / "sks.safetensors", tiny, device="cpu", strength_concept=0.5)("a V* cat", steps=4)[0]
    assert ImageChops.difference(own, half).getbbox()
