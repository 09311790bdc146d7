"""The integration's inputs and results: branch weights and cross-attention maps, by layer and step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dci.dual_branch.integration import Observe, TokenMasks
from ldm.unet import CrossLayer


@dataclass(frozen=True)
class BranchMaps:
    """One cross-attention layer at one call of the UNet, while both branches run; tensors are (b, heads, h, w)."""

    t: int  # training timestep
    number: int  # of the layer, in the order they run
    layer: CrossLayer
    weight: Tensor  # w_c in [0, 1]; the auxiliary branch has 1 - w_c
    concept: Tensor  # share of the concept branch's attention that goes to the concept's words, 0 to 1
    auxiliary: Tensor  # share of the auxiliary branch's attention that goes to the auxiliary noun


MapsCallback = Callable[[BranchMaps], None]
"""Gets the maps of every integrated layer, as the layers run; the UNet must not be compiled."""


def observer(
    callback: MapsCallback, t: int, number: int, layer: CrossLayer, masks: TokenMasks, latent: tuple[int, int]
) -> Observe:
    """Return the observer of a layer's integration at timestep t, which hands its maps to a callback.

    Args:
        masks: which tokens the named words are.
        latent: height and width of the latents, in cells.
    """
    size = [side // layer.factor for side in latent]

    def named(maps: Tensor, tokens: Tensor) -> Tensor:
        # Position 0 is the start token, which the masks do not count.
        return (maps[..., 1 : 1 + tokens.shape[-1]] * tokens[:, None, None]).sum(dim=-1).unflatten(-1, size)

    def observe(weight: Tensor, concept_maps: Tensor, auxiliary_maps: Tensor) -> None:
        concept, auxiliary = named(concept_maps, masks.concept), named(auxiliary_maps, masks.auxiliary)
        callback(BranchMaps(t, number, layer, weight.unflatten(-1, size), concept, auxiliary))

    return observe


class MapRecord:
    """Keeps the maps of a batch, averaged over heads, in fp16; `record` is a `MapsCallback`."""

    KINDS = ("weight", "concept", "auxiliary")

    def __init__(self):
        self.layers: dict[int, CrossLayer] = {}  # by number
        self.calls: dict[int, list[dict[str, np.ndarray]]] = {}  # layer number -> maps (b, h, w) of each call of the UNet
        self.timesteps: list[int] = []  # of those calls

    def record(self, maps: BranchMaps) -> None:
        """Add a layer's maps at a step."""
        self.layers[maps.number] = maps.layer
        if maps.number == min(self.layers):
            self.timesteps.append(maps.t)
        means = {kind: getattr(maps, kind).mean(dim=1).half().cpu().numpy() for kind in self.KINDS}
        self.calls.setdefault(maps.number, []).append(means)

    def arrays(self, row: int) -> dict[str, np.ndarray]:
        """Return an image's maps as the .npz file has them.

        `timesteps` (steps,); `layers`, the layers' names in the order they run; and for each of them
        `layerN/weight`, `layerN/concept` and `layerN/auxiliary` (steps, h, w).

        Args:
            row: of the batch.
        """
        numbers = sorted(self.layers)
        found = {"timesteps": np.array(self.timesteps)}
        found["layers"] = np.array([f"layer{n} {self.layers[n].name}" for n in numbers])
        for n in numbers:
            for kind in self.KINDS:
                found[f"layer{n}/{kind}"] = np.stack([call[kind][row] for call in self.calls[n]])
        return found
