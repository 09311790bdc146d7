"""Making a plan's images into a folder: what is missing, in batches, written while the next ones are sampled."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from PIL.Image import Image
from torch import Tensor

from dci.samples.plan import PlannedImage
from dci.samples.writer import SampleFolder
from ldm.images import to_images

BatchSampler = Callable[[list[PlannedImage]], Tensor]
"""Makes a batch: images of a plan -> pixels (b, 3, h, w) in [-1, 1]."""

WRITERS = 2  # threads that encode and write
AHEAD = 4  # batches that may wait to be written


def sample_missing(
    folder: SampleFolder,
    batches: list[range],
    sample: BatchSampler,
    done: Callable[[range, bool], None],
    grids: bool = True,
) -> None:
    """Make what is missing of the batches, and the grids of prompts that are complete then.

    A batch of which some images are there is made as it was planned, so that the others come out as they
    would have, and only these are written. What another process has locked is left to it; should it have
    ended without its work done by the time that all else is there, that is done here.

    Args:
        done: called with each batch, and whether it was made here.
        grids: a grid of each prompt's images, too.

    Raises:
        OSError: an image could not be written; what was made before is.
    """
    with _Writers(folder) as writers:
        locked_by_others: list[range] = []
        made: set[int] = set()
        for again, todo in ((False, batches), (True, locked_by_others)):
            for numbers in todo:
                missing = _locked_and_missing(folder, numbers)
                if missing is None and not again:
                    locked_by_others.append(numbers)
                    continue
                if missing:
                    images = [folder.plan.image(number) for number in numbers]
                    writers.write(numbers, missing, to_images(sample(images)))
                    made |= {image.prompt for image in images}
                done(numbers, bool(missing))
        writers.finish()
        for prompt in range(len(folder.plan.prompts)) if grids else ():
            if prompt in made or not folder.grid_file(prompt).is_file():
                writers.submit(folder.save_grid, prompt)


def _locked_and_missing(folder: SampleFolder, numbers: range) -> list[int] | None:
    """Lock a batch if something of it is missing, and return what; None where another process has the lock."""
    if not folder.missing(numbers):
        return []
    if not folder.acquire(numbers):
        return None
    missing = folder.missing(numbers)  # another process may have made them before the lock
    if not missing:
        folder.release(numbers)
    return missing


class _Writers:
    """Threads that encode and write images, a few batches behind; leaving the context waits for them.

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

    def write(self, numbers: range, missing: list[int], images: list[Image]) -> None:
        """Write the missing ones of a batch, whose lock ends then."""
        self.submit(self._write, numbers, missing, images)

    def submit(self, call: Callable, *args: object) -> None:
        """Have a call made; waits where too many are waiting."""
        self.waiting.append(self.pool.submit(call, *args))
        while self.waiting and (len(self.waiting) > AHEAD or self.waiting[0].done()):
            self.waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all calls."""
        while self.waiting:
            self.waiting.popleft().result()

    def _write(self, numbers: range, missing: list[int], images: list[Image]) -> None:
        try:
            for number, image in zip(numbers, images, strict=True):
                if number in missing:
                    self.folder.save(number, image)
        finally:
            self.folder.release(numbers)
