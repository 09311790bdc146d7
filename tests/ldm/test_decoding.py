"""Tiled and sliced decoding gives what decoding at once gives."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import mostly_slow

from benchmarks.measure import peak_bytes
from ldm.autoencoder import AutoencoderKL
from ldm.config import AutoencoderConfig
from ldm.runtime import decoding, device_memory
from ldm.runtime.acceleration import is_emulated
from ldm.runtime.decoding import bytes_of, decode, decoding_bytes, within_memory


@torch.inference_mode()
@pytest.mark.parametrize("tile", mostly_slow([16, 40, 64, 100], 40))
@pytest.mark.parametrize("shape", [(40, 24), (17, 33)])
def test_tiles_leave_no_seam(tiny_base, tile, shape):
    latents = torch.randn(2, 4, *shape) * torch.linspace(0.2, 2, shape[1])
    whole = tiny_base.decode(latents)
    assert (decode(tiny_base, latents, tile=tile) - whole).abs().max() < 1e-4


@torch.inference_mode()
def test_slices_and_large_tiles_change_nothing(tiny_base):
    latents = torch.randn(5, 4, 8, 8)
    whole = tiny_base.decode(latents)
    assert (decode(tiny_base, latents, batch=2) - whole).abs().max() < 1e-5
    assert torch.equal(decode(tiny_base, latents, tile=64), whole)


@pytest.mark.slow
@torch.inference_mode()
def test_tiles_in_half_precision(tiny):
    latents = torch.randn(1, 4, 32, 32)
    whole = tiny.decode(latents)
    tiled = decode(tiny.to(torch.bfloat16), latents, tile=48)
    assert tiled.dtype == torch.float32
    assert (tiled - whole).abs().mean() < 2e-2


@torch.inference_mode()
def test_short_memory_slices_the_batch_and_says_so(tiny_base, monkeypatch):
    latents = torch.randn(5, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = decode(tiny_base, latents)  # this machine has the few megabytes
    rows, plain = [], tiny_base.decode
    monkeypatch.setattr(tiny_base, "decode", lambda part: rows.append(len(part)) or plain(part))
    two = 2 * decoding_bytes(tiny_base.config.autoencoder, 32, 32, 4)
    monkeypatch.setattr(decoding, "free_memory", lambda device: 3 * two)  # half of it, but in powers of two
    with pytest.warns(UserWarning, match="2 of 5 images at a time.*vae_batch="):
        sliced = decode(tiny_base, latents)
    assert rows == [2, 2, 1]
    assert (sliced - whole).abs().max() < 1e-5
    monkeypatch.setattr(decoding, "free_memory", lambda device: 0)
    with pytest.warns(UserWarning, match="1 of 5"):
        decode(tiny_base, latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(tiny_base, latents, batch=5)  # as it was asked for
    assert rows[3:] == [1] * 5 + [5]


def test_a_gpu_without_room_for_one_image_gets_tiles():
    config = SimpleNamespace(autoencoder=AutoencoderConfig())
    gpu = SimpleNamespace(config=config, dtype=torch.float16, vae_dtype=torch.float16, device=torch.device("cuda"))
    one = decoding_bytes(config.autoencoder, 2048, 2048, 2)
    assert within_memory(gpu, 1, 2048, 2048, free=2 * one) == (1, None)
    with pytest.warns(UserWarning, match="tiles of"):
        batch, tile = within_memory(gpu, 3, 2048, 2048, free=one)
    assert batch == 1
    assert 512 <= tile < 2048


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_above_what_decoding_takes(dtype):
    if is_emulated(dtype, "cpu"):
        pytest.skip("emulated here, which takes minutes")
    network, latents = AutoencoderKL(AutoencoderConfig()).to(dtype).eval(), torch.randn(2, 4, 8, 8, dtype=dtype)
    estimate = 2 * decoding_bytes(AutoencoderConfig(), 64, 64, bytes_of(dtype, "cpu"))
    assert estimate / 2 < peak_bytes(lambda: network.decode(latents), "cpu") < estimate


def test_an_emulated_number_waits_beside_its_copy_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    assert [bytes_of(dtype, "cpu") for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [4, 6, 6]
    assert bytes_of(torch.bfloat16, "cuda") == 2
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "amx_bf16": True}, raising=False)
    assert bytes_of(torch.bfloat16, "cpu") == 2


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    def limited(folder, names, limit, usage, cache):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")

    job, own = tmp_path / "job", tmp_path / "own"
    limited(job, ("memory.max", "memory.current", "inactive_file"), 1000, 700, 50)
    limited(job / "step", ("memory.max", "memory.current", "inactive_file"), "max", 600, 0)
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limited(tmp_path / "memory" / "box", v1, 9000, 8000, 20)
    monkeypatch.setattr(device_memory, "_CGROUPS", tmp_path)
    own.write_text("0::/job/step\n4:memory:/box\n3:cpu:/box\n")
    plain = device_memory.Path
    monkeypatch.setattr(device_memory, "Path", lambda path: own if path == "/proc/self/cgroup" else plain(path))
    assert sorted(device_memory._left_in_cgroups()) == [350, 1020]
    assert device_memory.free_memory("cpu") == 350
