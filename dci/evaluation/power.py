"""The difference between two runs that a number of concepts can show: the report's interval, simulated.

Paired differences of images are taken apart into what concepts, prompts, seeds and their combinations add to
them (random effects of a crossed design without gaps; variances by the method of moments, Searle, Casella and
McCulloch, "Variance Components", 1992, Sec. 4.3). From these variances, differences of as many concepts as are
asked about are drawn, and each draw gets the report's bootstrap interval. Such an interval moves with the mean, so
the true difference at which its lower end would be above zero is its own half length, and the smallest
difference that is shown in a share of cases is a quantile of these lengths.

Effects are drawn as normal. With few concepts the present variances are themselves uncertain, and so is what follows.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dci.evaluation.bootstrap import bootstrap_mean
from dci.evaluation.scores import Scores, paired_differences
from ldm.errors import UserError

AXES = ("concept", "prompt", "seed")
POWER = 0.8
"""Share of repetitions in which a difference is to be shown; the usual one."""

Effect = tuple[str, ...]
"""Axes whose levels together have an effect of their own; () is the mean."""


@dataclass(frozen=True)
class Variances:
    """The variance of two runs' paired differences in one metric, by its sources."""

    metric: str
    levels: dict[str, int]  # axis -> how many levels it has
    components: dict[Effect, float]  # variance of each effect; never negative

    def of_mean(self, levels: Mapping[str, int] | None = None) -> float:
        """Variance of the mean difference over a design of so many levels; None: over the present one."""
        levels = {**self.levels, **(levels or {})}
        return sum(value / np.prod([levels[axis] for axis in effect]) for effect, value in self.components.items())


@dataclass(frozen=True)
class Shown:
    """The smallest difference that a design can show in one metric."""

    metric: str
    concepts: int
    difference: float  # the smallest true one that is shown in `power` of all repetitions
    half_length: float  # of the interval, in the mean
    power: float


def difference_variances(a: Scores, b: Scores) -> list[Variances]:
    """Return the variances of the paired differences a - b by source, for each metric that both have.

    Raises:
        UserError: the images of the two runs are not all combinations of concepts, prompts and seeds.
    """
    return [
        Variances(metric, dict(zip(AXES, table.shape, strict=True)), variance_components(table))
        for metric, table in _tables(a, b).items()
    ]


def variance_components(table: np.ndarray) -> dict[Effect, float]:
    """Return the variance of each effect in a table of values (concepts, prompts, seeds), negative estimates as 0.

    The expected mean square of an effect is the sum of the variances of all effects that contain it, each times
    how many values one combination of its levels has; solved from the largest effect down.
    """
    axes = [axis for axis in range(table.ndim) if table.shape[axis] > 1]
    effects = [effect for size in range(len(axes), 0, -1) for effect in itertools.combinations(axes, size)]
    found: dict[tuple[int, ...], float] = {}
    for effect in effects:
        explained = sum(
            _values_of_one(table.shape, other) * value for other, value in found.items() if set(effect) < set(other)
        )
        found[effect] = (_mean_square(table, effect) - explained) / _values_of_one(table.shape, effect)
    return {tuple(AXES[axis] for axis in effect): max(0.0, value) for effect, value in found.items()}


def _values_of_one(shape: Sequence[int], effect: tuple[int, ...]) -> int:
    """How many values share one combination of an effect's levels."""
    return int(np.prod([n for axis, n in enumerate(shape) if axis not in effect]))


def _mean_square(table: np.ndarray, effect: tuple[int, ...]) -> float:
    """The effect's mean square: of the cells' means what no smaller effect explains, over its degrees of freedom."""
    others = tuple(axis for axis in range(table.ndim) if axis not in effect)
    part = table.mean(axis=others, keepdims=True)
    for axis in effect:
        part = part - part.mean(axis=axis, keepdims=True)
    freedom = np.prod([table.shape[axis] - 1 for axis in effect])
    return float(_values_of_one(table.shape, effect) * (part**2).sum() / freedom)


def smallest_shown(
    variances: Variances,
    concepts: int,
    *,
    prompts: int | None = None,
    seeds: int | None = None,
    power: float = POWER,
    repetitions: int = 200,
    resamples: int = 999,
    seed: int = 0,
) -> Shown:
    """Return the smallest difference that a design shows, by simulation.

    Args:
        concepts, prompts, seeds: levels of the design; None: as many as at present.
        power: share of the repetitions in which the interval's lower end is to be above zero.
        repetitions: simulated runs of the whole comparison.
        resamples: of each one's bootstrap.

    Raises:
        UserError: a design of one concept, or a share that is none.
    """
    if concepts < 2:
        raise UserError(f"concepts {concepts}: expected 2 or more, an interval over one concept says nothing of others")
    if not 0 < power < 1:
        raise UserError(f"power {power}: expected a share between 0 and 1")
    levels = {
        "concept": concepts,
        "prompt": prompts or variances.levels["prompt"],
        "seed": seeds or variances.levels["seed"],
    }
    columns = _columns(levels)
    generator, below, lengths = np.random.default_rng(seed), [], []
    for _ in range(repetitions):
        values = _drawn(variances, levels, generator).ravel()
        interval = bootstrap_mean(values, columns, resamples, seed)
        below.append(-interval.low)
        lengths.append((interval.high - interval.low) / 2)
    return Shown(variances.metric, concepts, float(np.quantile(below, power)), float(np.mean(lengths)), power)


def concepts_needed(variances: Variances, difference: float, most: int = 128, **design) -> int | None:
    """Return how many concepts it takes to show a difference; None: `most` are not enough.

    Args:
        design: further arguments of `smallest_shown`.
    """
    low, high = 1, 2
    while smallest_shown(variances, high, **design).difference > difference:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if smallest_shown(variances, middle, **design).difference > difference:
            low = middle
        else:
            high = middle
    return high


def _drawn(variances: Variances, levels: dict[str, int], generator: np.random.Generator) -> np.ndarray:
    """Draw differences (concepts, prompts, seeds) of mean zero."""
    table = np.zeros([levels[axis] for axis in AXES])
    for effect, variance in variances.components.items():
        shape = [levels[axis] if axis in effect else 1 for axis in AXES]
        table = table + np.sqrt(variance) * generator.standard_normal(shape)
    return table


def _columns(levels: dict[str, int]) -> dict[str, list[str]]:
    """The labels of each value's levels, in the order of a flattened table."""
    grid = itertools.product(*(range(levels[axis]) for axis in AXES))
    return dict(zip(AXES, (list(map(str, column)) for column in zip(*grid, strict=True)), strict=True))


def _tables(a: Scores, b: Scores) -> dict[str, np.ndarray]:
    """Paired differences as a table (concepts, prompts, seeds) for each metric."""
    tables = {}
    for metric, found in paired_differences(a, b).items():
        names = [dict.fromkeys(labels) for labels in zip(*((r.concept, r.prompt, r.noise) for r, _ in found), strict=True)]
        shape = [len(labels) for labels in names]
        if np.prod(shape) != len(found):
            raise UserError(
                f"{metric}: {len(found)} pairs of images are not all combinations of {shape[0]} concepts, {shape[1]} "
                f"prompts and {shape[2]} seeds: compare runs that are complete"
            )
        place = [{label: number for number, label in enumerate(labels)} for labels in names]
        table = np.full(shape, np.nan)
        for row, value in found:
            table[place[0][row.concept], place[1][row.prompt], place[2][row.noise]] = value
        tables[metric] = table
    return tables
