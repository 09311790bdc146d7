"""Replay of numbers made with the published arithmetic: integration, UNet, trajectories."""

import json

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from dci.dual_branch.integration import DualBranch, TokenMasks, integrating_attend
from dci.dual_branch.sampling import BranchContexts, sample_latents
from ldm.config import ModelConfig, UNetConfig
from ldm.diffusion import LatentDiffusion
from ldm.text_to_image import SamplingOptions
from ldm.unet import UNet


class Golden:
    def __init__(self, stem):
        self.tensors = {name: tensor for name, tensor in load_file(f"{stem}.safetensors").items()}
        with open(f"{stem}.json") as file:
            self.cases = json.load(file)

    def __getitem__(self, name):
        tensor = self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor


def pytest_generate_tests(metafunc):
    golden = Golden(metafunc.config.getoption("--golden"))
    for kind, section in (("dbim", "dbim"), ("trajectory", "trajectories")):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, sorted(golden.cases[section]))


@pytest.fixture(scope="module")
def golden(request):
    return Golden(request.config.getoption("--golden"))


def masks_of(case, batch):
    def mask(positions, width):
        row = torch.zeros(width, dtype=torch.bool)
        row[list(positions)] = True
        return row.expand(batch, -1)

    concept, auxiliary = case["length_custom"], case["length_ldm"]
    return TokenMasks(
        mask(range(concept), concept),
        mask(case["mask_custom"], concept),
        mask(range(auxiliary), auxiliary),
        mask(case["mask_ldm"], auxiliary),
    )


def integrated(golden, dbim, dtype):
    case = golden.cases["dbim"][dbim]
    batch, rows = case["batch"], case["rows"]
    q, k, v = (rearrange(golden[f"{dbim}/{x}"].to(dtype), "b n (h d) -> b h n d", h=case["heads"]) for x in "qkv")
    dual = DualBranch(agg_lambda=case["lam"], shared_guidance=case["share_guidance"])
    attend = integrating_attend(masks_of(case, batch), dual, slice(batch, 2 * batch), slice(rows - batch, rows))
    return rearrange(attend(q, k, v), "b h n d -> b n (h d)")


def test_integration(golden, dbim):
    """The gain magnifies rounding: the stored numbers, worked out in single precision with one processor's exponential,
    are up to 5.5e-6 from the exact ones. Ours in double precision are the exact ones on every processor."""
    exact = integrated(golden, dbim, torch.float64)
    assert (golden[f"{dbim}/out"] - exact).abs().max() <= 1e-5
    assert (integrated(golden, dbim, torch.float32) - exact).abs().max() <= 2e-6


def golden_unet(golden):
    options = dict(golden.cases["unet"]["config"])
    for other in ("use_spatial_transformer", "legacy"):
        options.pop(other, None)
    factors = options.pop("attention_resolutions")
    return UNetConfig(attention_resolutions=list(factors), **options)


def load_unet(golden, unet):
    prefix = "unet/model.diffusion_model."
    unet.load_state_dict({n.removeprefix(prefix): golden[n] for n in golden.tensors if n.startswith(prefix)})
    return unet


@torch.no_grad()
def test_unet_forward(golden):
    unet = load_unet(golden, UNet(golden_unet(golden)))
    eps = unet(golden["unet_fwd/x"], golden["unet_fwd/t"], golden["unet_fwd/context"])
    assert (eps - golden["unet_fwd/eps"]).abs().max() <= 2e-5


@torch.no_grad()
def test_trajectory(golden, trajectory):
    case = golden.cases["trajectories"][trajectory]
    with torch.device("meta"):  # only the UNet is used
        model = LatentDiffusion(ModelConfig(unet=golden_unet(golden)))
    model.model.diffusion_model = load_unet(golden, UNet(golden_unet(golden)))
    from ldm.schedule import alphas_cumprod

    model.alphas_cumprod = alphas_cumprod(model.config.schedule)

    batch = case["batch"]
    concept = golden[f"{trajectory}/context_custom"]
    unconditional = golden[f"{trajectory}/context_uncond"].expand(batch, -1, -1)
    auxiliary = golden[f"{trajectory}/context_aux"] if case["dci"] else concept
    dual = masks = None
    noises = [lambda: golden[f"{trajectory}/x_T"]]
    if case["dci"]:
        dual = DualBranch(case["agg_time"], case["lam"], shared_guidance=case["share_guidance"])
        masks = masks_of(case, batch)
        noises.append(lambda: golden[f"{trajectory}/x_T_aux"])
    seen = []
    latents = sample_latents(
        model,
        BranchContexts(unconditional, concept, auxiliary),
        masks,
        dual,
        SamplingOptions(steps=case["S"], scale=case["guidance_scale"], eta=case["eta"]),
        noises,
        callback=seen.append,
    )
    assert [step["t"] for step in seen] == case["timesteps_in_order"]
    for i, step in enumerate(seen):
        branches = step["x"] if step["x"].dim() == 5 else step["x"][None]
        assert (len(branches) == 2) == (step["t"] in case.get("dual_steps", []))
        for branch, name in zip(branches, (f"step{i}_x", f"step{i}_x_aux"), strict=False):
            assert (branch - golden[f"{trajectory}/{name}"]).abs().max() <= 1e-3
    assert (latents - golden[f"{trajectory}/latent_final"]).abs().max() <= 1e-3
