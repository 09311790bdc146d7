"""The folder that sampling writes: samples/NNNNN.png, and prompts.json with the metadata of each image.

prompts.json is complete before the first image is made: it is the plan that a repeated command goes on
with, and that other workers share. An image is whole or not there.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dci.files import write_atomically
from dci.samples.file_locks import FileLocks
from dci.samples.metadata import first_difference, normal_form, shortened
from dci.samples.plan import Plan
from dci.samples.webui_parameters import parameters_text
from ldm.errors import UserError
from ldm.images import grid, read_image
from ldm.texts import readable

_PNG_END = bytes.fromhex("0000000049454e44ae426082")


class SampleFolder:
    """A folder's place for the images of one plan; a context that holds its locks.

    Args:
        append: put the images behind others that are there; else other images there are an error.
        complete: whether what is to be beside an image of that name is there; else it counts as missing.

    Raises:
        UserError: images cannot be put there; nothing was written.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Plan,
        append: bool = False,
        complete: Callable[[str], bool] = lambda name: True,
    ):
        self.folder, self.plan, self.append, self.complete = Path(folder), plan, append, complete
        self.samples, self.record = self.folder / "samples", self.folder / "prompts.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder} is a file: give a folder")
        self._place(self._read())

    def __enter__(self) -> "SampleFolder":
        self.samples.mkdir(parents=True, exist_ok=True)
        self.locks = FileLocks(self.folder / ".locks")
        with self.locks.exclusive():
            for file in self.folder.glob(f".{self.record.name}.*.tmp"):  # of workers that were killed
                file.unlink()
            record = self._read()
            self.first = self._place(record)
            planned = {self._stem(n): self.plan.metadata(n) for n in range(len(self.plan))}
            added = {stem: metadata for stem, metadata in planned.items() if stem not in record}
            if added:
                write_atomically(self.record, json.dumps(record | normal_form(added), indent=2).encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._sweep()
        self.locks.close()

    def file(self, number: int) -> Path:
        """Return where image `number` of the plan belongs."""
        return self.samples / f"{self._stem(number)}.png"

    def missing(self, numbers: range) -> list[int]:
        """Return the numbers whose image is not there, or not whole."""
        return [n for n in numbers if not (_is_whole(self.file(n)) and self.complete(self._stem(n)))]

    def acquire(self, numbers: range) -> bool:
        """Whether the images are this process's to make, until it ends or releases them."""
        return self.locks.acquire(range(self.first + numbers.start, self.first + numbers.stop))

    def release(self, numbers: range) -> None:
        """Let other processes make them."""
        self.locks.release(range(self.first + numbers.start, self.first + numbers.stop))

    def save(self, number: int, image: Image.Image) -> None:
        """Write an image, its metadata in the text chunk `parameters`."""
        write_atomically(self.file(number), image_bytes(self.plan, number, image))

    def grid_file(self, prompt: int) -> Path:
        """Return where the grid of a prompt's images belongs."""
        first = self.first + prompt * self.plan.per_prompt
        return self.folder / (f"grid-{first:05}.png" if first else "grid.png")

    def save_grid(self, prompt: int) -> None:
        """Write the grid of a prompt's images, unless some are still missing."""
        numbers = range(prompt * self.plan.per_prompt, (prompt + 1) * self.plan.per_prompt)
        if not self.missing(numbers):
            write_atomically(self.grid_file(prompt), _png(grid([read_image(self.file(n)) for n in numbers])))

    def _stem(self, number: int) -> str:
        return f"{self.first + number:05}"

    def _read(self) -> dict:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        except ValueError as error:
            raise UserError(f"{self.record} is not readable as JSON: mend it, or give another folder") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.record} is not a record of images by their names: give another folder")
        return record

    def _place(self, record: dict) -> int:
        """Return the number that the plan's first image has, or has got before, in the folder."""
        on_disk = {file.stem for file in self.samples.glob("*.png")} if self.samples.is_dir() else set()
        used = {int(stem): stem for stem in record.keys() | on_disk if stem.isdecimal()}
        if not self.append:
            if problem := self._difference(record, used, 0, ("batch_size",)):
                raise UserError(
                    f"{self.folder} holds other images: {problem}; give another folder, or the options of those images"
                )
            return 0
        end = max(used, default=-1) + 1
        start = self.plan.metadata(0)
        firsts = [number for number in sorted(used) if first_difference(record.get(used[number]), start) is None]
        return next((first for first in firsts if not self._difference(record, used, first)), end)

    def _difference(self, record: dict, used: dict[int, str], first: int, tolerated: tuple[str, ...] = ()) -> str | None:
        """Return in what the images that are there from `first` on are not the plan's; None where they are."""
        for number in range(len(self.plan)):
            stem = used.get(first + number)
            if stem is None:
                continue
            if not isinstance(record.get(stem), dict):
                return f"{self.record.name} does not tell what {stem}.png was made with"
            if found := first_difference(record[stem], self.plan.metadata(number), tolerated):
                return f"'{found.name}' of {stem} is {shortened(found.there)} there and {shortened(found.here)} here"
        return None

    def _sweep(self) -> None:
        """Take away what killed workers left half-written beside images that are whole by now."""
        for file in self.samples.glob(".*.png.*.tmp"):
            if (self.samples / f"{file.name.split('.')[1]}.png").is_file():
                file.unlink(missing_ok=True)


def image_bytes(plan: Plan, number: int, image: Image.Image) -> bytes:
    """Return the PNG file of image `number` of a plan, its metadata in the text chunk `parameters`."""
    info = PngInfo()
    info.add_itxt("parameters", readable(parameters_text(plan.metadata(number))))
    return _png(image, pnginfo=info)


def _is_whole(file: Path) -> bool:
    try:
        with open(file, "rb") as content:
            content.seek(-len(_PNG_END), io.SEEK_END)
            return content.read() == _PNG_END
    except OSError:  # not there, or too short
        return False


def _png(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    return content.getvalue()
