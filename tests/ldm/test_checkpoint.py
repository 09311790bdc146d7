"""Loading of weights: strict, and it says what it will not take."""

import pytest
import torch
from helpers import ROOT, mostly_slow
from safetensors.torch import load_file, save_file

from ldm.checkpoint import fingerprint, load_model, load_weights, read_state_dict, token_table
from ldm.errors import UserError
from ldm.formats.separate_vae import PREFIX
from ldm.formats.weights import read_file

TINY = ROOT / "configs/model/tiny.yaml"


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
    assert len(ids) < 2000  # the rows that pretraining used


@pytest.mark.parametrize("dtype", mostly_slow([torch.float16, torch.bfloat16, torch.float32, None], torch.float16))
def test_the_fingerprint_is_the_files_in_every_precision(tiny_base, dtype):
    assert fingerprint(load_model(ROOT / "configs/model/tiny.yaml", dtype=dtype)) == fingerprint(tiny_base)


def test_the_fingerprint_does_not_depend_on_the_precision_of_the_file(tiny):
    known = fingerprint(tiny)
    assert fingerprint(tiny.half()) == known
    assert len(known) == 16


NESTS = {
    "model": lambda state: {"model": state, "epoch": 3},
    "module": lambda state: {"module": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
    "state_dict in model": lambda state: {"model": {"state_dict": state}, "global_step": 7},
    "every name wrapped": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled": lambda state: {"module": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    "settings beside": lambda state: {"model": {"layers": 3, "model": {"width": 4}}, "module": state},
    "settings around": lambda state: {"state_dict": {"version": 1}, "model": {"module": state}},
}


@pytest.mark.parametrize("nest", NESTS)
def test_weights_are_found_wherever_a_trainer_puts_them(nest, tmp_path):
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    torch.save(NESTS[nest](state), tmp_path / "a.ckpt")
    found, _ = read_file(tmp_path / "a.ckpt")
    assert found.keys() == state.keys()


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_names_are_found_without_a_pickle_too(wrapper, tmp_path):
    save_file({f"{wrapper}a.weight": torch.ones(2), f"{wrapper}b": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_file(tmp_path / "a.safetensors")[0].keys() == {"a.weight", "b"}


def test_a_file_that_holds_itself_is_refused(tmp_path):
    content = {"epoch": 1}
    content["model"] = content["state_dict"] = content
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a.ckpt holds .* expected tensors"):
        read_file(tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["alone", "in a whole model", "nested"])
def test_an_autoencoder_of_its_own_takes_the_place_of_the_models(tiny_base, tmp_path, form):
    state = {name: tensor.clone() for name, tensor in tiny_base.state_dict().items()}
    bare = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match="lacks first_stage_model.* no autoencoder: give one as vae="):
        load_model(TINY, tmp_path / "bare.ckpt")
    vae = {name.removeprefix(PREFIX): tensor + 0.125 for name, tensor in state.items() if name.startswith(PREFIX)}
    vae = {PREFIX + name: tensor for name, tensor in vae.items()} | bare if form == "in a whole model" else vae
    torch.save({"model": vae} if form == "nested" else {"state_dict": vae}, tmp_path / "vae.ckpt")
    loaded = load_model(TINY, tmp_path / "bare.ckpt", vae=tmp_path / "vae.ckpt").state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor + 0.125 if name.startswith(PREFIX) else tensor), name
    torch.save({"x": torch.ones(1)}, tmp_path / "none.pt")
    with pytest.raises(UserError, match="none.pt holds no autoencoder"):
        load_model(TINY, tmp_path / "bare.ckpt", vae=tmp_path / "none.pt")


def test_averaged_weights_alone_are_taken(tiny_base, tmp_path):
    state = tiny_base.state_dict()
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", "") if name.startswith("model.") else name: tensor
        for name, tensor in state.items()
    }
    torch.save({"state_dict": averaged}, tmp_path / "a.ckpt")
    loaded = load_model(TINY, tmp_path / "a.ckpt").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
