"""Attention maps come and go with their layer: at SDXL's size those of one layer alone are hundreds of megabytes."""

import pytest
import torch
from calls import PROMPT
from diffusers_world import world
from helpers import mostly_slow
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dci.dual_branch import integration


class MapsAlive(TorchDispatchMode):
    """Follows every tensor with a row for each pixel of the cross-attention layer that runs and a column for each token.

    Args:
        widths: of a column for each token: of all, or of those that a branch's prompt has.
    """

    def __init__(self, unet, widths):
        super().__init__()
        self.widths, self.layer, self.pixels, self.made = widths, None, 0, []
        self.seen, self.most = set(), 0
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                module.register_forward_pre_hook(self._enter(name))
                module.register_forward_hook(self._leave)

    def _enter(self, name):
        def enter(module, args):
            self.layer, self.pixels = name, args[0].shape[1]

        return enter

    def _leave(self, *_):
        self.layer = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if self.layer and self._is_map(tensor):
                self.made.append((self.layer, StorageWeakRef(tensor.untyped_storage())))
        self.made = [(layer, storage) for layer, storage in self.made if not storage.expired()]
        layers = {layer for layer, _ in self.made}
        self.seen, self.most = self.seen | layers, max(self.most, len(layers))
        return out

    def _is_map(self, tensor):
        of_tokens = isinstance(tensor, torch.Tensor) and tensor.ndim > 2 and tensor.shape[-1] in self.widths
        return of_tokens and tensor.is_floating_point() and tensor.shape[-2] == self.pixels


def sampled(family, **options):
    pipe = world(family).pipe()
    branches = pipe.parse(PROMPT)
    alive = MapsAlive(pipe.unet, {77, branches.concept_length, branches.auxiliary_length})
    generator = torch.Generator().manual_seed(1)
    with alive:
        pipe(PROMPT, num_inference_steps=2, agg_time=0.6, output_type="latent", generator=generator, **options)
    assert len(alive.seen) == len(world(family).model.unet.cross_layers())
    return alive.most


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"maps": lambda maps: None}])
@pytest.mark.parametrize("family", mostly_slow(["sd1", "xl"], "sd1"))
def test_maps_of_one_layer_alone_are_alive(family, options):
    assert sampled(family, **options) == 1


@pytest.mark.slow
def test_maps_that_stay_are_noticed(monkeypatch):
    kept, maps = [], integration.attention_maps
    monkeypatch.setattr(integration, "attention_maps", lambda q, k: kept.append(maps(q, k)) or kept[-1])
    assert sampled("sd1") == len(world("sd1").model.unet.cross_layers())
