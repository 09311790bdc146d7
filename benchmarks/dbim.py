"""The integration module alone: at each resolution of the UNet's attention, over attention without it."""

import argparse

import torch

from benchmarks import naive
from benchmarks.measure import compare, matrix_rate
from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.integration import DualBranch, TokenMasks, integrating_attend
from ldm.attention import attend
from ldm.config import ModelConfig
from ldm.errors import UserError


def measure(args: argparse.Namespace) -> list[dict]:
    """Measure each resolution; rows are [unconditional, concept, auxiliary] of `--batch` images."""
    if args.peer == "diffusers":
        raise UserError("dbim --peer diffusers: diffusers has no DCI; give --peer none or --peer naive")
    if args.peer == "pipeline":
        raise UserError(
            "dbim --peer pipeline: a pipeline is measured as a whole, by sample; give --peer none or --peer naive"
        )
    if args.compile:
        raise UserError("dbim --compile: the module is measured as it is; sample --compile has it in a compiled UNet")
    torch.manual_seed(0)
    rate = matrix_rate(args.device, getattr(torch, args.dtype))
    with torch.inference_mode():
        return [measure_level(args, side, heads, width, rate) for side, heads, width in levels(args)]


def levels(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return (side of the map, heads, width of a head) of each resolution with attention, finest first."""
    from benchmarks.peers import ROOT
    from ldm import config as configuration

    model = configuration.load(ModelConfig, ROOT / f"configs/model/{args.model}.yaml")
    unet, side = model.unet, (args.size or model.image_size) // model.autoencoder.downsampling
    found = []
    for level, mult in enumerate(unet.channel_mult):
        if 2**level in unet.attention_resolutions:
            width = int(unet.model_channels * mult)
            heads = width // unet.num_head_channels if unet.num_head_channels else unet.num_heads
            found.append((side // 2**level, heads, width // heads))
    return found


def measure_level(args: argparse.Namespace, side: int, heads: int, width: int, rate: float) -> dict:
    """Attention with integration, against attention alone or the published arithmetic."""
    b, dtype = args.batch, getattr(torch, args.dtype)
    q = torch.randn(3 * b, heads, side * side, width, device=args.device, dtype=dtype)
    k, v = (torch.randn(3 * b, heads, 77, width, device=args.device, dtype=dtype) for _ in range(2))
    prompt = parse_prompt("a V* dog on the beach", ConceptName(("<new1>",), "dog"))
    masks, dual = TokenMasks.of([prompt] * b, args.device), DualBranch()
    rows = slice(b, 2 * b), slice(2 * b, 3 * b)
    integrate = integrating_attend(masks, dual, *rows)
    others = {
        "none": {"attention alone": lambda: attend(q, k, v)},
        "naive": {"naive": lambda: naive.integrate(q, k, v, masks, dual, *rows)},
    }
    ways = {"ours": lambda: integrate(q, k, v), **others[args.peer]}
    return compare(f"DBIM, {side}x{side}, {heads} heads of {width}", ways, args.device, args.rounds, rate)
