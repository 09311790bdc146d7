"""Folders of generated images: `samples/NNNNN.png` and `prompts.json`, as this package and Custom Diffusion write them.

`prompts.json` is one of
    {"00000": "photo of a <new1> cat", ...}       Custom Diffusion's: stem or file name -> prompt
    {"00000": {"prompt": "...", "seed": 0, ...}}  this package's: every fact of the image
    ["photo of a <new1> cat", ...]                a prompt, or its metadata, for each image in the order of their numbers
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ldm.errors import UserError
from ldm.images import is_image, list_images, report_not_used
from ldm.shipped import find

RECORD = "prompts.json"
_NAMES = ("file", "file_name", "filename", "image", "name", "path")  # in lists of metadata
_TEXTS = ("prompt", "text", "caption")
_MODIFIERS = r"<new\d*>(?:\s*<new\d*>)*"
_MARKS = r"(?<!\w)V(?P<star>\d*)\*|\{(?P<brace>\d*)\}"


@dataclass(frozen=True)
class SampledImage:
    """A generated image and what is known of it."""

    file: Path
    prompt: str  # as it was asked for
    text: str  # without modifier tokens
    noise: str  # what its initial noise depends on, "seed:index"; "" where that is not recorded


def read_samples(folder: str | Path, class_nouns: Sequence[str] = ()) -> list[SampledImage]:
    """Return a folder's images in the order of their names.

    Args:
        folder: holds `samples/` (or the images themselves) and `prompts.json`.
        class_nouns: the ordinary words for the concepts, put where a prompt says V* or {} alone.

    Raises:
        UserError: the folder, its images or `prompts.json` are missing or broken, or an image has no prompt.
    """
    folder = find(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one that holds samples/ and {RECORD}")
    images = folder / "samples" if (folder / "samples").is_dir() else folder
    record = read_record(folder)
    files = [file for file in list_images(images) if images != folder or not _is_grid(file, record)]
    if isinstance(record, list):
        record = _named(record, files, folder / RECORD)
    entries = _by_stem(record, folder / RECORD)
    missing = [file for file in files if file.stem not in entries]
    if missing:
        raise UserError(
            f"{folder / RECORD} has no prompt for {missing[0].name}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: add them, or take the images out "
            f"of {images}"
        )
    found = [(file, entries[file.stem]) for file in files]
    return [
        SampledImage(file, _prompt(metadata), _text(metadata, class_nouns), _noise(metadata)) for file, metadata in found
    ]


def _is_grid(file: Path, record: dict | list) -> bool:
    """Whether a file is a grid of a folder's images, which no record names."""
    if not re.fullmatch(r"grid(-\d+)?", file.stem):
        return False
    keys = record if isinstance(record, dict) else [_image_name(entry) or "" for entry in record]
    return file.stem not in map(_stem, keys)


def _image_name(entry: Any) -> str | None:
    """The image that an entry of a list names, if it does."""
    return next((entry[n] for n in _NAMES if isinstance(entry, dict) and isinstance(entry.get(n), str)), None)


def report_content(folder: str | Path, used: Iterable[Path], report: Callable[[str], None]) -> None:
    """Tell in a line each what lies among a folder's images, and images beside them, that are not used, and which images
    its record names that are not there.

    Args:
        folder: see `read_samples`.
        used: its images.
    """
    folder, used = find(folder), list(used)
    inside = folder / "samples"
    if inside.is_dir():
        report_not_used(inside, used, report)
        used += [file for file in folder.iterdir() if not is_image(file)]  # maps, logs, reports: this package's
    record = read_record(folder) if (folder / RECORD).is_file() else []
    report_not_used(folder, [*used, RECORD, *(file for file in folder.iterdir() if _is_grid(file, record))], report)
    named = list(_by_stem(record, folder / RECORD)) if isinstance(record, dict) else []
    if missing := [stem for stem in named if stem not in {file.stem for file in used}]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        report(f"Missing in {folder}: {len(missing)} of the {len(named)} images that {RECORD} names ({names})")


def read_record(folder: str | Path) -> dict | list:
    """Return the content of a folder's `prompts.json`.

    Raises:
        UserError: it is missing, or holds something else than a dictionary or a list.
    """
    file = find(folder) / RECORD
    if not file.is_file():
        raise UserError(f'no {file}: expected the images\' prompts, {{"00000": "photo of a <new1> cat", ...}}')
    content = file.read_bytes()
    try:
        record = json.loads(content)  # UTF-8, -16 or -32, by its first bytes
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON ({error}): mend it") from error
    if not isinstance(record, (dict, list)) or not record:
        raise UserError(f'{file} holds no prompts: expected {{"00000": "photo of a <new1> cat", ...}}')
    return record


def concept_files(folder: str | Path) -> list[str]:
    """Return the concept files that the images of a folder were sampled with, as recorded."""
    record = read_record(folder)
    entries = record.values() if isinstance(record, dict) else record
    return list(dict.fromkeys(e["concept"] for e in entries if isinstance(e, dict) and isinstance(e.get("concept"), str)))


def without_modifiers(prompt: str, class_nouns: Sequence[str] = ()) -> str:
    """Return a prompt as the base model would be asked: "photo of a <new1> cat" -> "photo of a cat".

    V*, V1*, {} and {0} become the class noun where one is known and does not follow anyway.
    """

    def replaced(match: re.Match) -> str:
        one_based, zero_based = match["star"], match["brace"]
        number = int(one_based) - 1 if one_based else int(zero_based or 0)
        noun = class_nouns[number] if 0 <= number < len(class_nouns) else ""
        follows = noun and re.match(rf"\s*{re.escape(noun)}(?:e?s)?\b", prompt[match.end() :], re.IGNORECASE)
        return "" if follows else noun

    prompt = re.sub(_MODIFIERS, " ", prompt)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(re.sub(_MARKS, replaced, prompt).split()))


def _by_stem(record: dict, source: Path) -> dict[str, dict]:
    """Facts by the stem of their image; a stem with two prompts raises UserError."""
    entries: dict[str, dict] = {}
    for key, value in record.items():
        metadata, stem = _entry(value, source), _stem(key)
        if entries.setdefault(stem, metadata) != metadata:
            raise UserError(f"{source} has two prompts for {stem}, the second under {key}: keep one of them")
    return entries


def _stem(key: str) -> str:
    """The stem of an image's name, whatever folders and extension stand around it."""
    name = PureWindowsPath(PurePosixPath(key).name).name
    return name.rsplit(".", 1)[0] if re.search(r"\.(png|jpe?g|webp|bmp|gif|tiff?)$", name, re.IGNORECASE) else name


def _named(record: list, files: list[Path], source: Path) -> dict:
    """A list of prompts or metadata as a dictionary."""
    keys = [_image_name(entry) for entry in record]
    if all(keys):
        return dict(zip(keys, record, strict=True))
    if len(record) != len(files):
        raise UserError(f"{source} lists {len(record)} prompts for {len(files)} images: expected one for each")
    return {file.stem: entry for file, entry in zip(_in_order(files, source), record, strict=True)}


def _in_order(files: list[Path], source: Path) -> list[Path]:
    """Files in the order of the numbers in their names, or of the names where no number says otherwise.

    Raises:
        UserError: the order is not certain.
    """
    parts = {file: re.split(r"([0-9]+)", file.stem) for file in files}  # texts and, between them, numbers
    numbers = {file: tuple(map(int, part[1::2])) for file, part in parts.items()}
    if len({tuple(part[::2]) for part in parts.values()}) == 1 and len(set(numbers.values())) == len(files):
        return sorted(files, key=numbers.__getitem__)
    keys = {file: tuple(int(p) if i % 2 else p.lower() for i, p in enumerate(part)) for file, part in parts.items()}
    by_name = sorted(files, key=lambda file: file.stem)
    if by_name != sorted(files, key=keys.__getitem__) or len(set(keys.values())) < len(files):
        names = ", ".join(file.name for file in by_name[:2])
        raise UserError(
            f"{source} lists prompts without names, and the order of {names}, ... is not certain: "
            'give {"NAME": "prompt", ...} instead'
        )
    return by_name


def _entry(value: object, source: Path) -> dict:
    metadata = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(metadata, dict) or not any(isinstance(metadata.get(name), str) for name in _TEXTS):
        raise UserError(
            f'{source} has {json.dumps(value)[:60]} where a prompt was expected: give its text, or metadata with "prompt"'
        )
    return metadata


def _prompt(metadata: dict) -> str:
    return next(metadata[name] for name in _TEXTS if isinstance(metadata.get(name), str))


def _text(metadata: dict, class_nouns: Sequence[str]) -> str:
    """The concept's prompt has the class noun; what was asked for may leave it out."""
    concept_prompt = metadata.get("concept_prompt")
    return without_modifiers(concept_prompt if isinstance(concept_prompt, str) else _prompt(metadata), class_nouns)


def _noise(metadata: dict) -> str:
    if metadata.get("seed") is None:
        return ""
    return f"{metadata['seed']}:{metadata['index']}" if metadata.get("index") is not None else str(metadata["seed"])
