"""The fused integration kernels against the plain version, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch, TokenMasks, integrating_attend
from ldm.attention import attend

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = INTERPRETED or torch.cuda.is_available()
runnable = pytest.mark.skipif(not RUNNABLE, reason="no GPU: the interpreter runs it in a process of its own")

B, HEADS = 2, 2
CONCEPT, AUXILIARY = slice(B, 2 * B), slice(2 * B, 3 * B)


@pytest.mark.slow
@pytest.mark.skipif(RUNNABLE, reason="this process runs the kernels itself")
def test_all_of_this_in_the_interpreter():
    """Triton decides once, when it is imported, whether kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def kernels():
    from dci.dual_branch import integration_triton

    return integration_triton


def inputs(pixels, width, dtype=torch.float32):
    """Queries, keys and values as the UNet makes them: heads are slices of a pixel's row."""
    device = "cpu" if INTERPRETED else "cuda"
    lengths = (pixels, 77, 77)
    q, k, v = (torch.randn(3 * B, n, HEADS, width, device=device).to(dtype).transpose(1, 2) for n in lengths)
    return 2 * q, k, v


def masks_of(device):
    prompts = [
        parse_prompt("a V* dog on the beach", ConceptName(("<new1>", "<new2>"), "dog")),
        parse_prompt("V* in a red city street at night", ConceptName(("<new1>", "<new2>"), "dog"), "cat"),
    ]
    return TokenMasks.of(prompts, device)


@runnable
@pytest.mark.parametrize("agg_lambda", [0.0, 0.7, -2.0])
@pytest.mark.parametrize(("pixels", "width"), [(16, 40), (100, 16), (256, 80), (64, 160)])
def test_the_kernels_equal_the_plain_version(kernels, pixels, width, agg_lambda):
    q, k, v = inputs(pixels, width)
    dual, masks = DualBranch(agg_lambda=agg_lambda, gain=500 * pixels / 4096), masks_of(q.device)
    expected = integrating_attend(masks_of("cpu"), dual, CONCEPT, AUXILIARY)(q.cpu(), k.cpu(), v.cpu())
    out = attend(q, k, v)
    plain = out.clone()
    kernels.integrate(out, q, k, masks, dual, CONCEPT, AUXILIARY)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    # Mixed at all, and the other rows untouched.
    assert (out[CONCEPT] - plain[CONCEPT]).abs().max() > 1e-2
    assert torch.equal(out[:B], plain[:B])
    assert torch.equal(out[AUXILIARY], plain[AUXILIARY])


@runnable
def test_half_precision_mixes_with_weights_of_full_precision(kernels):
    q, k, v = inputs(100, 40, torch.float16)
    dual, masks = DualBranch(agg_lambda=0.5, gain=20.0), masks_of(q.device)
    exact = integrating_attend(masks_of("cpu"), dual, CONCEPT, AUXILIARY)(*(x.float().cpu() for x in (q, k, v)))
    out = attend(q, k, v)
    kernels.integrate(out, q, k, masks, dual, CONCEPT, AUXILIARY)
    # What fp16 outputs can hold.
    torch.testing.assert_close(out.float().cpu(), exact, rtol=3e-3, atol=3e-3)


@runnable
def test_the_evidence_of_uniform_attention_is_known(kernels):
    """Keys all alike: each of a prompt's L tokens has 1 / L of the sharpened attention, at every pixel."""
    q, k, _ = inputs(50, 16)
    k = torch.zeros_like(k)
    masks = masks_of(q.device)
    concept = masks.concept_counts, masks.concept
    evidence = kernels.evidence(q[CONCEPT], k[CONCEPT], *concept, 10.0, 10.0, others=False)
    share = masks.concept.sum(1) / masks.concept_counts.sum(1)
    expected = 10 * share.float()[:, None, None].expand_as(evidence.values)
    torch.testing.assert_close(evidence.values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evidence.total, torch.full_like(evidence.total, 50.0), rtol=1e-5, atol=1e-5)


LARGE = 3e38  # nearly the largest number of single precision


@runnable
@pytest.mark.parametrize(
    "constants",
    [
        {"pixel_sharpness": 0.0},
        {"pixel_sharpness": 88.0},
        {"pixel_sharpness": 89.0},
        {"pixel_sharpness": 1000.0},
        {"pixel_sharpness": LARGE},
        {"token_sharpness": 0.0},
        {"token_sharpness": 1000.0},
        {"token_sharpness": LARGE},
        {"gain": 0.0},
        {"gain": LARGE},
        {"agg_lambda": LARGE},
        {"agg_lambda": -LARGE},
        {"token_sharpness": 0.0, "pixel_sharpness": 0.0, "gain": 0.0},
        {"pixel_sharpness": 500.0, "gain": LARGE, "agg_lambda": LARGE},
        {"pixel_sharpness": 500.0, "gain": LARGE, "agg_lambda": -LARGE},
        {"token_sharpness": LARGE, "pixel_sharpness": LARGE, "gain": 1, "agg_lambda": 2},
    ],
    ids=lambda constants: ",".join(f"{name}={value:g}" for name, value in constants.items()),
)
def test_extremes_of_every_constant(kernels, constants):
    """On 100 pixels, that is on two blocks, the second not full."""
    q, k, v = inputs(100, 16)
    dual, masks = DualBranch(**{"agg_lambda": 0.7, "gain": 12.0, **constants}), masks_of(q.device)
    expected = integrating_attend(masks_of("cpu"), dual, CONCEPT, AUXILIARY)(q.cpu(), k.cpu(), v.cpu())
    assert expected.isfinite().all()
    out = attend(q, k, v)
    kernels.integrate(out, q, k, masks, dual, CONCEPT, AUXILIARY)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
