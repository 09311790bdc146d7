"""The benchmarks: each runs and writes its files, the peers compute the same, and programs start without the networks."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, refused, run_here, run_main

from benchmarks import naive, report
from benchmarks.measure import count_flops, peak_bytes
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch, TokenMasks, integrating_attend
from ldm.attention import attend
from ldm.config import ModelConfig, UNetConfig
from ldm.runtime.acceleration import accelerate, fastest_precision
from ldm.runtime.cpu_convolutions import MkldnnConv2d, to_mkldnn
from ldm.unet import UNet

RUNS = {
    "sample --peer diffusers": ["ours", "diffusers"],
    "sample --peer naive": ["ours", "naive"],
    "sample --peer pipeline": ["DCI", "plain"],
    "dbim": ["ours", "attention alone"],
    "dbim --peer naive": ["ours", "naive"],
    "train --peer diffusers --precision bf16": ["ours", "diffusers"],
    "load": ["ours"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_every_comparison_writes_what_it_measured(command, tmp_path):
    run_main("benchmark.py", *command.split(), "--rounds", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path)
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    ours, *others = RUNS[command]
    for result in content["measurements"]:
        assert list(result["ways"]) == [ours, *others]
        for figures in result["ways"].values():
            assert 0 < figures["range"][0] <= figures["median"] <= figures["range"][1]
            assert figures["peak_bytes"] > 0
        assert all(result["ratios"][other]["median"] > 0 for other in others)
        # The same weights and inputs: the outputs equal each other.
        assert result.get("notes", {}).get("relative_difference", 0) < 1e-4
        assert f"| {result['name']}: {ours} |" in file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_dci_costs_what_its_steps_say(tmp_path):
    """FLOPs of the whole process: a dual step has three rows, a plain one two."""
    run_main("benchmark.py", "--rounds", 1, "--steps", 2, "--agg-time", 1, "--device", "cpu", "--out", tmp_path)
    (file,) = tmp_path.glob("*.json")
    (result,) = json.loads(file.read_text())["measurements"]
    assert 1.3 < result["ways"]["DCI"]["flops"] / result["ways"]["plain"]["flops"] < 1.55
    rate = result["notes"]["images_per_second,_DCI"]
    assert rate == pytest.approx(1 / result["ways"]["DCI"]["median"])
    assert 0.5 < result["notes"]["share_of_time_inside_the_networks"] <= 1


def test_peers_that_do_not_exist_are_refused(capfd):
    pipelines = [f"{what} --peer pipeline" for what in ("dbim", "train", "load")]
    for command in ("dbim --peer diffusers", "train --peer naive", "load --peer naive", *pipelines):
        refused(run_here(capfd, "benchmark.py", *command.split()), command, "give --peer none")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("dbim --compile", "dbim --compile"),
        ("load --compile", "load measures loading into main memory"),
        ("train --precision fp16", "fp16 needs a GPU"),
        ("sample --size 100", "--size 100: expected a multiple of 16 pixels"),
        ("train --model sd-v1 --size 100", "expected a multiple of 64 pixels"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(command, said, capfd, tmp_path):
    refused(run_here(capfd, "benchmark.py", *command.split(), "--device", "cpu", "--out", tmp_path), said)


def test_results_of_other_sizes_have_files_of_their_own(tmp_path):
    given = dict(what="sample", model="tiny", peer="none", device="cpu", precision="fp32", batch=1, size=None, compile=False)
    names = [report.write(tmp_path, given | other, []).name for other in ({}, {"batch": 4, "size": 32}, {"compile": True})]
    assert names == [
        "sample-tiny-none-cpu-fp32.md",
        "sample-tiny-none-cpu-fp32-batch4-32px.md",
        "sample-tiny-none-cpu-fp32-compiled.md",
    ]


@pytest.mark.slow
@torch.no_grad()
def test_naive_attention_computes_the_same(tiny_base):
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 871]), torch.randn(2, 77, 128)
    unet = tiny_base.unet
    plain = naive.naive_unet(unet)
    assert any(isinstance(module, naive.NaiveAttention) for module in plain.modules())
    assert {p.data_ptr() for p in plain.parameters()} == {p.data_ptr() for p in unet.parameters()}
    torch.testing.assert_close(plain(x, t, context), unet(x, t, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("agg_lambda", [0.0, 0.8])
def test_naive_integration_computes_the_same(agg_lambda):
    q, k, v = (torch.randn(3, 2, n, 16) for n in (64, 77, 77))
    masks = TokenMasks.of([parse_prompt("a V* dog on the beach", ConceptName(("<new1>",), "dog"))])
    rows, dual = (slice(1, 2), slice(2, 3)), DualBranch(agg_lambda=agg_lambda, gain=20)
    expected = integrating_attend(masks, dual, *rows)(q, k, v)
    torch.testing.assert_close(naive.integrate(q, k, v, masks, dual, *rows), expected, rtol=1e-4, atol=1e-5)


def test_memory_and_flops_are_those_of_known_work():
    a, b = torch.randn(64, 128), torch.randn(128, 256)
    assert count_flops(lambda: a @ b) == 2 * 64 * 128 * 256
    # The product and the sum are held at once; the second product comes when both are gone.
    assert peak_bytes(lambda: [(a @ b) + 1] and a @ b, "cpu") == pytest.approx(2 * 4 * 64 * 256, rel=0.01)
    q, k = torch.randn(1, 1, 512, 8), torch.randn(1, 1, 512, 8)
    maps = 4 * 512**2
    assert peak_bytes(lambda: naive.attend(q, k, k), "cpu") >= 2 * maps
    assert peak_bytes(lambda: attend(q, k, k), "cpu") < maps / 2


@pytest.mark.slow
@torch.no_grad()
def test_packed_convolutions_compute_the_same():
    config = UNetConfig(model_channels=320, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2], context_dim=32)
    unet = UNet(config).eval()
    torch.nn.init.normal_(unet.out[-1].weight, std=0.02)
    t, context = torch.tensor([3, 871]), torch.randn(2, 77, 32)
    inputs = [torch.randn(2, 4, side, side) for side in (8, 16)]  # the second of another size than was packed for
    expected = [unet(x, t, context) for x in inputs]
    flops = count_flops(lambda: unet(inputs[0], t, context))
    to_mkldnn(unet)
    assert count_flops(lambda: unet(inputs[0], t, context)) == flops
    assert any(isinstance(module, MkldnnConv2d) for module in unet.modules())
    for x, output in zip(inputs, expected, strict=True):
        torch.testing.assert_close(unet(x, t, context), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "geometry",
    [{"padding": 1}, {"padding": 1, "stride": 2}, {}, {"padding": 2}, {"padding": 3}, {"padding": 2, "dilation": 2}],
    ids=str,
)
def test_the_gradient_passes_packed_convolutions(geometry):
    conv = torch.nn.Conv2d(32, 48, 3, **geometry).requires_grad_(False)
    packed = MkldnnConv2d(copy.deepcopy(conv))
    for side in (9, 12):
        x = torch.randn(2, 32, side, side, requires_grad=True)
        y = conv(x)
        torch.testing.assert_close(packed(x), y)
        gradient = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, gradient)
        (actual,) = torch.autograd.grad(packed(x), x, gradient)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_embedded_model_is_sampled_as_it_is(tiny):
    """Narrow networks gain nothing: no other precision, nothing packed."""
    assert fastest_precision(tiny.config, "cpu") == torch.float32
    assert fastest_precision(ModelConfig(), "cpu") in (torch.float32, torch.bfloat16)
    accelerate(tiny, "cpu")
    assert not any(isinstance(module, MkldnnConv2d) for module in tiny.modules())


PROGRAMS = sorted(file.name for file in (ROOT / "scripts").glob("*.py") if "__main__" in file.read_text())
HEAVY = {"torch", "numpy", "transformers", "diffusers", "pytorch_lightning", "matplotlib", "omegaconf"}


# One interpreter for all: each program runs in a fork of it, which has imported next to nothing.
HELP = """
import json, os, runpy, sys
for program in sys.argv[1:]:
    print(end="", flush=True)
    if os.fork() == 0:
        sys.path.insert(0, os.path.dirname(program))
        sys.argv, code = [program, "--help"], 1
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def helps():
    """(what it printed, its exit code, the packages that it has imported) of each program, asked for its help."""
    command = [sys.executable, "-c", HELP, *(str(ROOT / "scripts" / program) for program in PROGRAMS)]
    said, found = [], []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.startswith("[") and line.endswith("]]"):
            found.append(("\n".join(said), *json.loads(line)))
            said = []
        else:
            said.append(line)
    return dict(zip(PROGRAMS, found, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each program runs in a fork")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(helps, program):
    printed, code, imported = helps[program]
    assert code == 0
    assert "usage:" in printed
    assert "argparse" in imported and not HEAVY & set(imported)


@pytest.mark.slow
def test_sampling_starts_without_what_it_does_not_use(tmp_path):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
sys.argv = ["txt2img.py", "--prompt", "a dog", "--n-samples", "1", "--steps", "1", "--outdir", {str(tmp_path)!r}]
runpy.run_path({str(ROOT / "scripts/txt2img.py")!r}, run_name="__main__")
unused = {{"transformers", "open_clip", "torchvision", "diffusers", "pytorch_lightning", "matplotlib", "torch._dynamo"}}
assert not unused & set(sys.modules), unused & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
