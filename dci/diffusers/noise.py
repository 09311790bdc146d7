"""The auxiliary branch's noise: another stream than the pipeline's, which follows from the same generators."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def forked(generator: Any, device: torch.device) -> Any:
    """Return a generator, or a list where there is one, whose numbers follow from the state of the given one.

    The given one is left as it is: what the pipeline draws is the same with DCI and without.

    Args:
        generator: a `torch.Generator`, a list of them, or None for PyTorch's own of the device.
    """
    if isinstance(generator, (list, tuple)):
        return [forked(own, device) for own in generator]
    if generator is not None:
        return _seeded(generator.get_state(), generator.device)
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    return _seeded(module.get_rng_state(), torch.device("cpu"))


def like(latents: Tensor, given: Tensor | None, generator: Any) -> Tensor:
    """Return N(0, 1) noise of the shape, precision and device of latents, drawn if none is given."""
    from diffusers.utils.torch_utils import randn_tensor

    if given is None:
        return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    return given.to(latents).expand_as(latents)


def _seeded(state: Tensor, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(b"auxiliary branch" + state.cpu().numpy().tobytes()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
