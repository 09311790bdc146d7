"""The folder that sampling writes: samples/NNNNN.png, and prompts.json that tells what each picture is of.

prompts.json is complete before the first picture is drawn: it is the plan that a repeated command goes on
with, and that other workers share. A picture is whole or not there.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dci.claims import Claims
from dci.files import write_atomically
from dci.parameters import parameters_text
from dci.plan import Plan
from ldm.errors import UserError
from ldm.images import grid, read_picture

_PNG_END = bytes.fromhex("0000000049454e44ae426082")


class SampleFolder:
    """A folder's place for the pictures of one plan; a context that holds its claims.

    Args:
        append: put the pictures behind others that are there; else other pictures there are an error.
        complete: whether what is to be beside a picture of that name is there; else it counts as missing.

    Raises:
        UserError: pictures cannot be put there; nothing was written.
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
            raise UserError(f"--outdir {folder} is a file: give a folder")
        self._place(self._read())

    def __enter__(self) -> "SampleFolder":
        self.samples.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(self.folder / ".claims")
        with self.claims.alone():
            for file in self.folder.glob(f".{self.record.name}.*.tmp"):  # of workers that were killed
                file.unlink()
            record = self._read()
            self.first = self._place(record)
            planned = {self._stem(n): self.plan.facts(n) for n in range(len(self.plan))}
            added = {stem: facts for stem, facts in planned.items() if stem not in record}
            if added:
                write_atomically(self.record, json.dumps(record | added, indent=2).encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._sweep()
        self.claims.close()

    def file(self, number: int) -> Path:
        """Return where picture `number` of the plan belongs."""
        return self.samples / f"{self._stem(number)}.png"

    def missing(self, numbers: range) -> list[int]:
        """Return the numbers whose picture is not there, or not whole."""
        return [n for n in numbers if not (_is_whole(self.file(n)) and self.complete(self._stem(n)))]

    def claim(self, numbers: range) -> bool:
        """Whether the pictures are this process's to make, until it ends or releases them."""
        return self.claims.take(range(self.first + numbers.start, self.first + numbers.stop))

    def release(self, numbers: range) -> None:
        """Give a claim back."""
        self.claims.give_back(range(self.first + numbers.start, self.first + numbers.stop))

    def save(self, number: int, picture: Image.Image) -> None:
        """Write a picture, its facts in the text chunk `parameters`."""
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(self.plan.facts(number)))
        write_atomically(self.file(number), _png(picture, pnginfo=info))

    def grid_file(self, prompt: int) -> Path:
        """Return where the grid of a prompt's pictures belongs."""
        first = self.first + prompt * self.plan.per_prompt
        return self.folder / (f"grid-{first:05}.png" if first else "grid.png")

    def save_grid(self, prompt: int) -> None:
        """Write the grid of a prompt's pictures, unless some are still missing."""
        numbers = range(prompt * self.plan.per_prompt, (prompt + 1) * self.plan.per_prompt)
        if not self.missing(numbers):
            write_atomically(self.grid_file(prompt), _png(grid([read_picture(self.file(n)) for n in numbers])))

    def _stem(self, number: int) -> str:
        return f"{self.first + number:05}"

    def _read(self) -> dict:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        except ValueError as error:
            raise UserError(f"{self.record} is not readable as JSON: mend it, or give another --outdir") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.record} is not a record of pictures by their names: give another --outdir")
        return record

    def _place(self, record: dict) -> int:
        """Return the number that the plan's first picture has, or has got before, in the folder."""
        on_disk = {file.stem for file in self.samples.glob("*.png")} if self.samples.is_dir() else set()
        used = {int(stem): stem for stem in record.keys() | on_disk if stem.isdecimal()}
        if not self.append:
            if problem := self._difference(record, used, 0, ("batch_size",)):
                raise UserError(
                    f"{self.folder} holds other pictures: {problem}; give another --outdir, or the options of those pictures"
                )
            return 0
        end = max(used, default=-1) + 1
        start = self.plan.facts(0)
        firsts = [number for number in sorted(used) if record.get(used[number]) == start]
        return next((first for first in firsts if not self._difference(record, used, first)), end)

    def _difference(self, record: dict, used: dict[int, str], first: int, tolerated: tuple[str, ...] = ()) -> str | None:
        """Say in what the pictures that are there from `first` on are not the plan's; None where they are."""
        for number in range(len(self.plan)):
            stem = used.get(first + number)
            if stem is None:
                continue
            if not isinstance(record.get(stem), dict):
                return f"{self.record.name} does not tell what {stem}.png was made with"
            there, planned = record[stem], self.plan.facts(number)
            for name in planned | there:
                if name not in tolerated and there.get(name) != planned.get(name):
                    return f"'{name}' of {stem} is {_short(there.get(name))} there and {_short(planned.get(name))} here"
        return None

    def _sweep(self) -> None:
        """Take away what killed workers left half-written beside pictures that are whole by now."""
        for file in self.samples.glob(".*.png.*.tmp"):
            if (self.samples / f"{file.name.split('.')[1]}.png").is_file():
                file.unlink(missing_ok=True)


def _is_whole(file: Path) -> bool:
    try:
        with open(file, "rb") as content:
            content.seek(-len(_PNG_END), io.SEEK_END)
            return content.read() == _PNG_END
    except OSError:  # not there, or too short
        return False


def _png(picture: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", **options)
    return content.getvalue()


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
