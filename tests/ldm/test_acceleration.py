"""What is done for speed: compiled graphs are as few as there are phases, and whatever is done is said."""

import pytest
import torch
from helpers import apart, pixels, run_main, sample_images

from benchmarks.measure import count_flops
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import dual_branch, sampling_options
from dci.finetuning.config import ConceptConfig, FinetuneConfig
from dci.finetuning.module import ICOTraining
from dci.finetuning.precision import check_device
from ldm.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.runtime.acceleration import PRECISIONS, accelerate, warn_of_emulation
from ldm.unet import UNet

UNET = UNetConfig(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], context_dim=64)
VAE, TEXT = AutoencoderConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1), TextEncoderConfig(width=64, layers=1, heads=2)


@pytest.mark.slow
@apart
def test_sampling_compiles_one_graph_for_each_phase(monkeypatch):
    """Traced as for compiling, without breaks, and executed as it is."""
    graphs, plain = [], torch.nn.Module.compile

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def trace(module, dynamic=None, mode=None):
        return plain(module, dynamic=dynamic, fullgraph=True, backend=collect)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    model = LatentDiffusion(ModelConfig(image_size=32, unet=UNET, autoencoder=VAE, text_encoder=TEXT)).eval()
    concept = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun="cat")), images=1).concept()
    options, dual = sampling_options(model, steps=2), dual_branch(model, agg_time=0.6, gain=5.0)
    texts = ["a V* cat", "a V* cat and a red car on the beach", "V* in the snow at night"]
    batches = [
        [parse_prompt(text, ConceptName(concept.modifier_tokens, "cat")) for text in pair] for pair in (texts[:2], texts[1:])
    ]

    def drawn():
        return torch.cat([sample_images(model, concept, prompts, [0, 1], options, dual) for prompts in batches])

    expected = drawn()
    assert accelerate(model, "cpu", compiled=True) == ["compiled UNet"]
    x, t, context = torch.randn(1, 4, 16, 16), torch.zeros(1), torch.randn(1, 77, 64)
    eager = count_flops(lambda: model.unet.forward(x, t, context))
    assert eager == count_flops(lambda: model.unet(x, t, context), compiled=True) > 0
    assert not graphs
    torch.testing.assert_close(drawn(), expected, rtol=1e-3, atol=1e-3)
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.slow
def test_with_compile_a_smaller_last_batch_is_filled_up(monkeypatch, tmp_path, capsys):
    rows, plain = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: rows.append(len(x)) or plain(self, x, *rest))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)

    def images(outdir, *more):
        run_main(
            "txt2img.py",
            "--prompt",
            "a dog",
            "--n-samples",
            3,
            "--batch-size",
            2,
            "--steps",
            1,
            "--device",
            "cpu",
            "--outdir",
            tmp_path / outdir,
            *more,
        )
        return [pixels(file) for file in sorted((tmp_path / outdir / "samples").glob("*.png"))]

    compiled, eager = images("compiled", "--compile"), images("eager")
    assert rows == [4, 4] + [4, 2]
    assert "For speed: compiled UNet" in capsys.readouterr().out
    assert len(compiled) == len(eager) == 3
    assert max(abs(a - b).max() for a, b in zip(compiled, eager, strict=True)) <= 1


@pytest.mark.slow
def test_what_is_done_for_speed_is_said(tiny):
    assert accelerate(tiny, "cpu") == []  # narrow networks gain nothing
    assert accelerate(tiny, "cpu", channels_last=True) == ["channels last in memory"]
    assert tiny.unet.out[-1].weight.is_contiguous(memory_format=torch.channels_last)
    wide = UNetConfig(model_channels=352, channel_mult=[1], num_res_blocks=1, attention_resolutions=[], context_dim=64)
    model = LatentDiffusion(ModelConfig(unet=wide, autoencoder=VAE, text_encoder=TEXT))
    assert accelerate(model, "cpu") == ["convolutions' weights packed"]
    # For a GPU, where half precision has its own layout; the model is moved there later.
    assert accelerate(tiny.half(), "cuda") == ["channels last in memory"]


@pytest.mark.parametrize(
    ("known", "emulated"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": False}, ["fp16"]),
        ({"architecture": "x86_64", "amx_bf16": True, "amx_fp16": True}, []),
        ({"architecture": "x86_64", "avx2": True}, ["fp16", "bf16"]),
        ({"architecture": "aarch64"}, []),  # whose capabilities do not tell
        ({}, []),
    ],
)
def test_an_emulated_precision_is_warned_of(known, emulated, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    for name, dtype in PRECISIONS.items():
        warn_of_emulation(dtype, "cpu")
        warn_of_emulation(dtype, "cuda")
        line = f"this processor only emulates {name}, which takes many times as long as fp32"
        assert [str(warning.message) for warning in recwarn] == [line] * (name in emulated)
        recwarn.clear()


def test_loading_and_training_warn_of_it(tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    with pytest.warns(UserWarning, match="only emulates bf16"):
        accelerate(tiny.bfloat16(), "cpu")
    with pytest.warns(UserWarning, match="only emulates bf16"):
        check_device("bf16", torch.device("cpu"))
