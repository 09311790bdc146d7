"""SDXL at full size with random weights in bf16, each half by itself, against diffusers and transformers.

python -m pytest -m fullsize tests/ldm/test_fullsize_sdxl.py     (minutes; the UNet takes 5 GB of disk and little memory,
the encoders 7 GiB of memory)
"""

import dataclasses

import pytest
import tiny_models
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from tiny_models import computing_in, mapped_weights, padded, relative_error

from benchmarks.peers import diffusers_unet, empty
from ldm import tokenizer
from ldm.conditioning import ImageSize
from ldm.formats import presets
from ldm.formats.diffusers_names import text_names
from ldm.text_pair import PairedTextEncoder
from ldm.unet import UNet

pytestmark = pytest.mark.fullsize

SIZE = ImageSize((1024, 1024), (0, 0), (1024, 1024)).row()


def as_good_as_theirs(ours, theirs, exact):
    """The error of our bf16 is that of bf16: against theirs and against fp32."""
    own = relative_error(theirs.float(), exact)
    between = relative_error(ours.float(), theirs.float())
    print(f"bf16 itself {own:.2e}, ours {relative_error(ours.float(), exact):.2e}, between them {between:.2e}")
    assert 0 < own < 0.1
    assert relative_error(ours.float(), exact) < 1.5 * own
    assert between < 2 * own


@torch.no_grad()
@pytest.mark.parametrize("shape", [{"num_res_blocks": 1, "transformer_depth": [0, 1, 1]}, {}], ids=["less deep", "whole"])
def test_unet(shape, tmp_path):
    config, width = presets.sdxl().unet, presets.sdxl().text_encoder_2.projection
    config = dataclasses.replace(config, **shape)
    with torch.device("meta"):
        ours = UNet(config).eval()
    state = mapped_weights(ours, tmp_path / "weights")
    ours.load_state_dict(state, assign=True)
    theirs = empty(diffusers_unet(config, 128, (config.adm_in_channels - width) // 6)).eval()
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(named, theirs.config), assign=True)
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    context, pooled = torch.randn(1, 77, config.context_dim), torch.randn(1, width)
    vector = torch.cat([pooled, theirs.add_time_proj(SIZE.flatten()).view(1, -1)], dim=-1)

    def call(x, context, pooled):
        with computing_in(theirs, x.dtype):
            more = {"text_embeds": pooled, "time_ids": SIZE.to(x.dtype)}
            return theirs(x, t, context, added_cond_kwargs=more).sample

    half = [tensor.bfloat16() for tensor in (x, context, pooled, vector)]
    exact, found = call(x, context, pooled), call(*half[:3])
    with computing_in(ours, torch.float32):
        assert relative_error(ours(x, t, context, vector=vector), exact) < 1e-5
    with computing_in(ours, torch.bfloat16):
        as_good_as_theirs(ours(half[0], t, half[1], vector=half[3]), found, exact)


@torch.no_grad()
def test_text_encoders():
    config = presets.sdxl()
    with torch.device("meta"):
        ours = PairedTextEncoder(config).eval()
    state, states = {}, []
    ids = tokenizer.tokenize("a photo of a dog on the beach")
    exact, theirs = [], []
    for i, encoder in enumerate((config.text_encoder, config.text_encoder_2)):
        text = tiny_models.randomized(tiny_models.transformers_text(encoder))
        row = torch.tensor([padded(ids, tokenizer.END if i == 0 else 0)])
        states.append(text(row, output_hidden_states=True))
        exact += [states[-1].hidden_states[-2]]
        text.bfloat16()
        states.append(text(row, output_hidden_states=True))
        theirs += [states[-1].hidden_states[-2]]
        state |= text_names(text.state_dict(), encoder, f"embedders.{i}.")
    ours.load_state_dict(state, assign=True)
    found = ours.condition(torch.tensor([tokenizer.frame(ids)]), None, SIZE)
    as_good_as_theirs(found.tensor, torch.cat(theirs, dim=-1), torch.cat(exact, dim=-1))
    as_good_as_theirs(found.vector[:, :1280], states[3].text_embeds, states[2].text_embeds)
