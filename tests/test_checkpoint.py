"""Loading of weights: strict, and it says what it will not take."""

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from ldm.checkpoint import fingerprint, load_model, load_weights, read_state_dict, token_table
from ldm.errors import UserError


@pytest.fixture
def state(tiny_base):
    return {name: tensor.clone() for name, tensor in tiny_base.state_dict().items()}


def test_a_checkpoint_in_one_file_loads_as_the_folder_does(tiny_base, state, tmp_path):
    save_file(state, tmp_path / "whole.safetensors")
    loaded = load_model(ROOT / "configs/model/tiny.yaml", tmp_path / "whole.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


BESIDES = """
betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod log_one_minus_alphas_cumprod posterior_variance logvar
model_ema.decay cond_stage_model.transformer.text_model.embeddings.position_ids
"""


def test_keys_that_sd_checkpoints_carry_besides_are_tolerated(tiny, state):
    load_weights(tiny, {**state, **{name: torch.zeros(1) for name in BESIDES.split()}}, "x")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight"])
def test_anything_missing_unexpected_or_of_another_shape_is_named(tiny, state, prefix):
    with pytest.raises(UserError, match=f"x lacks {prefix}"):
        load_weights(tiny, {n: t for n, t in state.items() if n != prefix}, "x")
    with pytest.raises(UserError, match=f"x has unknown {prefix}s"):
        load_weights(tiny, {**state, prefix + "s": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match=rf"x does not fit: {prefix} is \(1,\), expected"):
        load_weights(tiny, {**state, prefix: torch.zeros(1)}, "x")


def test_a_truncated_file_is_refused(tmp_path):
    whole = (ROOT / "data/tiny/vae.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="half.safetensors is not a whole .safetensors file"):
        read_state_dict(tmp_path / "half.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint at"):
        read_state_dict(tmp_path / "empty")


def test_untrained_tokens_are_always_the_same(tiny_base):
    stored = load_file(ROOT / "data/tiny/text.safetensors")
    ids = next(tensor for name, tensor in stored.items() if name.endswith(".ids")).long()
    table = tiny_base.text_encoder.token_table
    untrained = torch.ones(len(table), dtype=torch.bool)
    untrained[ids] = False
    assert torch.equal(table[untrained], token_table(128, 49408)[untrained])
    # RandomState(0)'s first number, which numpy promises never to change.
    assert token_table(1, 1).item() == pytest.approx(0.02 * 1.764052345967664)
    assert len(ids) < 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_the_fingerprint_is_the_files_in_every_precision(tiny_base, dtype):
    assert fingerprint(load_model(ROOT / "configs/model/tiny.yaml", dtype=dtype)) == fingerprint(tiny_base)


def test_the_fingerprint_does_not_depend_on_the_precision_of_the_file(tiny):
    known = fingerprint(tiny)
    assert fingerprint(tiny.half()) == known
    assert len(known) == 16
