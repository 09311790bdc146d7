"""What the branches did, recorded while a batch is sampled, and written as sheets and maps beside its images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dci.concept.prompts import BranchPrompts
from dci.dual_branch.attention_maps import MapRecord, MapsCallback
from dci.dual_branch.predictions import StepRecord, choose_steps
from ldm.diffusion import LatentDiffusion
from ldm.images import to_images
from ldm.sampling_loop import Callback

Files = dict[tuple[str, str], Any]
"""(folder, ending) -> content of a file that belongs to an image."""


class BranchRecorder:
    """Sheets of images, made as these are sampled and written when they have names.

    Args:
        maps: record branch weights and attention maps.
        steps: record both branches' predicted images.
    """

    def __init__(self, model: LatentDiffusion, maps: bool = False, steps: bool = False):
        self.model, self.maps, self.steps = model, maps, steps
        self.waiting: list[Files] = []  # of each image of the last batch

    def sample(
        self,
        sample: Callable[[Callback, MapsCallback | None], Tensor],
        prompts: Sequence[BranchPrompts],
        progress: Callback,
    ) -> Tensor:
        """Call `sample(callback, maps)` for a batch, make its sheets, and return its pixels (b, 3, h, w).

        Args:
            prompts: of each row.
            progress: called after each step, too.
        """
        steps, maps = StepRecord(), MapRecord()

        def callback(step: dict[str, Any]) -> None:
            steps.record(step)
            progress(step)

        pixels = sample(callback, maps.record if self.maps else None)
        self.waiting = [self._sheets(row, pixels[row], prompt, steps, maps) for row, prompt in enumerate(prompts)]
        return pixels

    def is_there(self, outdir: Path, name: str) -> bool:
        """Whether an image's sheets are written already."""
        maps, steps = outdir / "maps" / f"{name}.npz", outdir / "steps" / f"{name}.png"
        return (maps.is_file() or not self.maps) and (steps.is_file() or not self.steps)

    def save(self, outdir: Path, names: Sequence[str]) -> None:
        """Write the sheets of the last batch's images, which have these names."""
        for name, files in zip(names, self.waiting, strict=True):
            for (folder, ending), content in files.items():
                (outdir / folder).mkdir(parents=True, exist_ok=True)
                file = outdir / folder / (name + ending)
                np.savez_compressed(file, **content) if ending == ".npz" else content.save(file)
        self.waiting = []

    def _sheets(self, row: int, pixels: Tensor, prompt: BranchPrompts, steps: StepRecord, maps: MapRecord) -> Files:
        from dci.dual_branch.figures import map_sheet, step_sheet  # Matplotlib is needed for sheets alone

        files: Files = {}
        if self.steps:
            shown = steps.images(self.model, row, choose_steps(len(steps.timesteps), steps.dual_steps))
            files["steps", ".png"] = step_sheet(shown, prompt.concept, prompt.auxiliary)
        if self.maps:
            arrays = files["maps", ".npz"] = maps.arrays(row)
            # The auxiliary branch has no finished image: its last prediction stands for one.
            (other,) = steps.images(self.model, row, [steps.dual_steps - 1]).auxiliary
            (own,) = to_images(pixels[None])
            for kind, text in (("weight", prompt.concept), ("concept", prompt.concept), ("auxiliary", prompt.auxiliary)):
                image = other if kind == "auxiliary" and other is not None else own
                files["maps", f"-{kind}.png"] = map_sheet(kind, arrays, image, text)
        return files
