"""Blind pairs for people to judge: two runs' images of one concept, prompt and noise, sides and order by chance."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dci.evaluation.answers import Answer
from dci.evaluation.evaluate import recorded_references
from dci.evaluation.grid_result import GridResult
from dci.samples.reader import read_samples
from ldm.errors import UserError
from ldm.images import list_images


@dataclass(frozen=True)
class RatedImage:
    """A generated image, what it was asked to be, and the run that made it."""

    run: str
    concept: str
    prompt: str
    text: str  # without modifier tokens
    noise: str
    file: Path
    references: tuple[Path, ...]


@dataclass(frozen=True)
class Pair:
    """Two images side by side; which run made which is not shown."""

    left: RatedImage
    right: RatedImage

    def key(self, question: str) -> tuple:
        """Key of this question about these two images, independent of which one stands left."""
        return question, frozenset((image.run, str(image.file)) for image in (self.left, self.right))

    def answer(self, question: str, answer: str, rater: str, time: str) -> Answer:
        """Return an answer to be kept."""
        ours, theirs = self.left, self.right
        sides = (ours.run, str(ours.file), theirs.run, str(theirs.file))
        return Answer(question, ours.concept, ours.prompt, ours.noise, *sides, answer, rater, time)


def key_of(answer: Answer) -> tuple:
    """Return the key of the pair and question that an answer is to."""
    sides = ((answer.left_run, answer.left_file), (answer.right_run, answer.right_file))
    return answer.question, frozenset((run, str(Path(file).resolve())) for run, file in sides)


def images_of(folders: Mapping[str, Path], references: Sequence[Path] = ()) -> list[RatedImage]:
    """Return the images of sample folders, or of all points of a grid's folder.

    Args:
        folders: name of the run -> folder of samples; or one grid's folder, whose runs are named as its report does.
        references: folders of the concept's images; none: as the concept files record.

    Raises:
        UserError: a folder or a file in it is missing or cannot be used, or there are no two runs.
    """
    grids = [folder for folder in folders.values() if (folder / "cells").is_dir()]
    if grids and len(folders) > 1:
        raise UserError(f"{grids[0]} is a grid's folder, which holds all its runs: give it alone")
    if grids:
        found = _of_grid(grids[0])
    else:
        found = [image for run, folder in folders.items() for image in _of_samples(run, folder, references)]
    runs = dict.fromkeys(image.run for image in found)
    if len(runs) < 2:
        raise UserError(f"pairs take two runs, and there is {next(iter(runs), 'none')}: give another folder, NAME=FOLDER")
    return found


def _of_samples(run: str, folder: Path, references: Sequence[Path]) -> list[RatedImage]:
    sources = list(references) or recorded_references(folder)
    shown = tuple(file.resolve() for source in sources for file in list_images(source))
    return [RatedImage(run, "", s.prompt, s.text, s.noise, s.file.resolve(), shown) for s in read_samples(folder)]


def _of_grid(folder: Path) -> list[RatedImage]:
    results = sorted((folder / "cells").glob("*/*/*/*/result.json"))
    found, settings = [], {file.parent.name for file in results}
    for file in results:
        result = GridResult.load(file)
        references = result.scores.metadata.references
        if not references:
            raise UserError(f"{file} names no references: remove it, and run the grid again")
        run = f"{result.method}, {result.setting}" if len(settings) > 1 else result.method
        shown = tuple(Path(reference).resolve() for reference in references)
        found += [
            RatedImage(run, result.concept, row.prompt, row.text, row.noise, Path(row.file).resolve(), shown)
            for row in result.scores.rows
        ]
    if not found:
        raise UserError(f"{folder} has no finished points yet: run the grid first")
    return found


def make_pairs(images: Sequence[RatedImage], seed: int = 0, most: int | None = None) -> list[Pair]:
    """Return the pairs of any two runs' images of the same concept, prompt and noise, in an order by chance.

    Args:
        seed: of the order and the sides; the same seed gives the same pairs in the same order.
        most: so many of them at most.

    Raises:
        UserError: no two runs have an image in common.
    """
    groups: dict[tuple, list[RatedImage]] = {}
    for image in images:
        groups.setdefault((image.concept, image.prompt, image.noise), []).append(image)
    chance = random.Random(seed)
    pairs = []
    for group in groups.values():
        for two in itertools.combinations(group, 2):
            if two[0].run != two[1].run and two[0].noise:
                pairs.append(Pair(*chance.sample(two, 2)))
    if not pairs:
        raise UserError(
            "no two runs have an image of the same prompt and noise: generate both with the same prompts and seeds"
        )
    chance.shuffle(pairs)
    return pairs[:most]
