"""The field's benchmark data sets: which concepts, which images, which prompts.

DreamBench (Ruiz et al., CVPR 2023), DreamBench++ (Peng et al., ICLR 2025) and CustomConcept101 (Kumari et al., CVPR
2023), read from the folders in which their authors publish them.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

LIVE_CLASSES = ("cat", "dog")
"""Classes that DreamBench's prompts for live subjects are for; the file itself does not say which are."""


@dataclass(frozen=True)
class DatasetConcept:
    """One concept of a data set, or several that are sampled together, and the prompts to sample."""

    name: str
    images: tuple[Path, ...]  # a folder for each concept, or the one image file of it
    class_nouns: tuple[str, ...]
    prompts: tuple[str, ...]  # with {} for the concept and its noun, or {0}, {1} for several
    regularization: tuple[Path | None, ...] = (None,)  # captioned images of each class


def read_dreambench(folder: str | Path) -> list[DatasetConcept]:
    """Read `prompts_and_classes.txt` and the subjects whose folders lie beside it.

    Args:
        folder: the data set's own folder, or the one above, with `dataset/` in it.

    Raises:
        UserError: no such file, or not of the published layout.
    """
    folder = Path(folder)
    root = folder if (folder / "prompts_and_classes.txt").is_file() else folder / "dataset"
    file = root / "prompts_and_classes.txt"
    classes, prompts = _parse_dreambench(_read(file, "DreamBench's prompts and classes"), file)
    subjects = [
        DatasetConcept(name, (root / name,), (noun,), prompts[noun in LIVE_CLASSES])
        for name, noun in classes.items()
        if (root / name).is_dir()
    ]
    if not subjects:
        raise UserError(f"{root} has none of the {len(classes)} subjects that prompts_and_classes.txt names")
    return subjects


def _parse_dreambench(text: str, file: Path) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """Return the class of each subject, and the prompts for objects and for live subjects, with {} for the concept."""
    rows = re.findall(r"^([\w-]+),([\w -]+?)\s*$", text, re.MULTILINE)
    classes = {name: noun for name, noun in rows if name != "subject_name"}
    lists = [re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", part) for part in re.findall(r"\[(.*?)\]", text, re.S)]
    prompts = [tuple(ast.literal_eval(line).replace("{0} {1}", "{}") for line in part) for part in lists]
    if not classes or len(prompts) != 2 or not all(prompts) or any("{}" not in line for part in prompts for line in part):
        raise UserError(f"{file}: expected lines 'subject,class' and two lists of prompts with {{0}} {{1}}, as published")
    return classes, prompts


def read_dreambench_plus(folder: str | Path) -> list[DatasetConcept]:
    """Read the images of `images/` and the captions of `captions/`, which lie in the same folders under the same names.

    A caption file's first line is the subject, the others are prompts that name it: nine, in the published set of 150. A
    prompt that does not name it, as of a style, has it added behind a comma. Names are the benchmark's own, such as
    live_subject_animal_00_kitten.

    Args:
        folder: holds `images/` and `captions/`, or `data/` with them.

    Raises:
        UserError: a missing file or folder, or a caption file without prompts.
    """
    root = Path(folder) if (Path(folder) / "captions").is_dir() else Path(folder) / "data"
    files = sorted((root / "captions").rglob("*.txt"))
    if not files:
        raise UserError(f"no captions in {root / 'captions'}: give the folder that DreamBench++'s data.zip unpacks to")
    return _unlike_names([_captioned(root, file) for file in files])


def _captioned(root: Path, file: Path) -> DatasetConcept:
    """One image of DreamBench++ with its subject and prompts."""
    beside = root / "images" / file.relative_to(root / "captions")
    image = next((found for end in (".jpg", ".jpeg", ".png") if (found := beside.with_suffix(end)).is_file()), None)
    if image is None:
        raise UserError(f"no {beside.with_suffix('.jpg')} for {file}: unpack DreamBench++'s images beside its captions")
    subject, *prompts = (line.strip() for line in _read(file, "DreamBench++'s captions").splitlines() if line.strip())
    if not prompts:
        raise UserError(f"{file} has no prompts: expected the subject in the first line, and prompts behind it")
    category = f"live_subject_{file.parent.name}" if file.parent.name in ("animal", "human") else file.parent.name
    name = re.sub(r"[^\w.+=,-]", "_", f"{category}_{file.stem}_{subject.lower()}")
    named = tuple(_with_place(prompt, subject) for prompt in prompts)
    return DatasetConcept(name, (image,), (subject.lower(),), named)


def _with_place(prompt: str, subject: str) -> str:
    """A prompt with {} for its subject, whole or by its last word."""
    prompt = prompt.replace("{", "(").replace("}", ")")
    for words in dict.fromkeys((subject, subject.split()[-1])):
        found, number = re.subn(rf"\b{re.escape(words)}\b", "{}", prompt, count=1, flags=re.IGNORECASE)
        if number:
            return found
    return f"{prompt.rstrip(' .')}, {{}}"


def read_customconcept101(folder: str | Path, pairs: bool = False) -> list[DatasetConcept]:
    """Read `dataset.json`, or the pairs of `dataset_multiconcept.json`, and their prompt files.

    Args:
        folder: holds the JSON files, `prompts/` and `benchmark_dataset/`.

    Raises:
        UserError: a missing file or folder, or a layout other than the published one.
    """
    root = Path(folder)
    file = root / ("dataset_multiconcept.json" if pairs else "dataset.json")
    try:
        entries = json.loads(_read(file, "CustomConcept101's list of concepts"))
        subjects = [_pair(root, entry) if pairs else _single(root, entry) for entry in entries]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is not of CustomConcept101's layout ({type(error).__name__}: {error})") from error
    return _unlike_names(subjects)


def _single(root: Path, entry: dict[str, Any]) -> DatasetConcept:
    name = Path(entry["instance_data_dir"]).name
    return DatasetConcept(
        name,
        (_images(root, entry),),
        (_noun(entry),),
        _prompts(root / entry["prompt_filename"]),
        (_regularization(root, entry),),
    )


def _pair(root: Path, entry: list[dict[str, Any]]) -> DatasetConcept:
    *parts, composed = entry
    return DatasetConcept(
        "+".join(Path(part["instance_data_dir"]).name for part in parts),
        tuple(_images(root, part) for part in parts),
        tuple(_noun(part) for part in parts),
        _prompts(root / composed["prompt_filename_compose"]),
        tuple(_regularization(root, part) for part in parts),
    )


def _noun(entry: dict[str, Any]) -> str:
    """The class noun, in the words of the training prompt "photo of a <new1> dice plushie"."""
    return re.split(r"<new\d+>\s*", entry["instance_prompt"], maxsplit=1)[1].strip()


def _images(root: Path, entry: dict[str, Any]) -> Path:
    folder = root / entry["instance_data_dir"]
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: unpack CustomConcept101's benchmark_dataset.zip in {root}")
    return folder


def _regularization(root: Path, entry: dict[str, Any]) -> Path | None:
    """The folder of regularization images, which the data set comes without; None where none was added."""
    folder = root / entry["class_data_dir"]
    return folder if folder.is_dir() else None


def _prompts(file: Path) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _read(file, "CustomConcept101's prompts").splitlines() if line.strip())
    if not lines:
        raise UserError(f"{file} has no prompts: expected one in each line")
    return lines


def _unlike_names(subjects: list[DatasetConcept]) -> list[DatasetConcept]:
    """Number subjects of the same name, of which the pairs have some."""
    seen: dict[str, int] = {}
    renamed = []
    for subject in subjects:
        seen[subject.name] = seen.get(subject.name, 0) + 1
        number = seen[subject.name]
        name = subject.name if number == 1 else f"{subject.name}-{number}"
        renamed.append(DatasetConcept(name, subject.images, subject.class_nouns, subject.prompts, subject.regularization))
    return renamed


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"no {file}: {what} ought to be there; give the data set's folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable as UTF-8 text ({error})") from error
