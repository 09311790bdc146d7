"""Drawing a plan's pictures into a folder: what is missing, in batches, written while the next ones are drawn."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from PIL.Image import Image
from torch import Tensor

from dci.plan import PlannedPicture
from dci.sample_folder import SampleFolder
from ldm.images import to_pictures

Sample = Callable[[list[PlannedPicture]], Tensor]
"""Draws a batch: pictures of a plan -> pixels (b, 3, h, w) in [-1, 1]."""

WRITERS = 2  # threads that encode and write
AHEAD = 4  # batches that may wait to be written


def draw(folder: SampleFolder, batches: list[range], sample: Sample, done: Callable[[range, bool], None]) -> None:
    """Draw what is missing of the batches, and the grids of prompts that are complete then.

    A batch of which some pictures are there is drawn as it was planned, so that the others come out as they
    would have, and only these are written. What another process has claimed is left to it; should it have
    ended without its work done by the time that all else is drawn, that is done here.

    Args:
        done: told of each batch, and whether it was drawn here.

    Raises:
        OSError: a picture could not be written; what was drawn before is.
    """
    with _Writers(folder) as writers:
        claimed_by_others, drawn = [], set()
        for again, todo in ((False, batches), (True, claimed_by_others)):
            for numbers in todo:
                missing = _claimed_and_missing(folder, numbers)
                if missing is None and not again:
                    claimed_by_others.append(numbers)
                    continue
                if missing:
                    pictures = [folder.plan.picture(number) for number in numbers]
                    writers.write(numbers, missing, to_pictures(sample(pictures)))
                    drawn |= {picture.prompt for picture in pictures}
                done(numbers, bool(missing))
        writers.finish()
        for prompt in range(len(folder.plan.prompts)):
            if prompt in drawn or not folder.grid_file(prompt).is_file():
                writers.submit(folder.save_grid, prompt)


def _claimed_and_missing(folder: SampleFolder, numbers: range) -> list[int] | None:
    """Claim a batch if something of it is missing, and return what; None where another process has the claim."""
    if not folder.missing(numbers):
        return []
    if not folder.claim(numbers):
        return None
    missing = folder.missing(numbers)  # another process may have made them before the claim
    if not missing:
        folder.release(numbers)
    return missing


class _Writers:
    """Threads that encode and write pictures, a few batches behind; leaving the context waits for them.

    They stay off the device, where a CUDA graph may be being captured. An error of theirs is raised by the
    next call, or on leaving.
    """

    def __init__(self, folder: SampleFolder):
        self.folder, self.pool, self.waiting = folder, ThreadPoolExecutor(WRITERS), deque[Future]()

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            self.finish()

    def write(self, numbers: range, missing: list[int], pictures: list[Image]) -> None:
        """Write the missing ones of a batch, whose claim ends then."""
        self.submit(self._write, numbers, missing, pictures)

    def submit(self, call: Callable, *args: object) -> None:
        """Have a call made; waits where too many are waiting."""
        self.waiting.append(self.pool.submit(call, *args))
        while self.waiting and (len(self.waiting) > AHEAD or self.waiting[0].done()):
            self.waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all calls."""
        while self.waiting:
            self.waiting.popleft().result()

    def _write(self, numbers: range, missing: list[int], pictures: list[Image]) -> None:
        try:
            for number, picture in zip(numbers, pictures, strict=True):
                if number in missing:
                    self.folder.save(number, picture)
        finally:
            self.folder.release(numbers)
