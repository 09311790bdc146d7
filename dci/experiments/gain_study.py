"""What decides how much one method gains over another: factors that were set on purpose, and traits of the concepts.

A concept's gain is the mean paired difference of a metric between the two methods. Concepts of one noun that differ in
one factor alone (`noun-usual`, `noun-small`, ...) show its effect: their gain less the usual one's, prompt by prompt and
noise by noise, with an interval over nouns, prompts and noises. Traits such as the distance from what the base model
knows are held against the gains by rank (Spearman), with an interval over the concepts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dci.evaluation.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap_mean
from dci.evaluation.metrics import DINO_I
from dci.evaluation.scores import RunScores, Scores, paired_differences, pool
from dci.experiments.grid import GridPoint
from ldm.errors import UserError

USUAL = "usual"
"""The variant of a noun that others are compared with."""

Gains = dict[str, dict[tuple[str, str], float]]
"""Concept -> (prompt, noise) -> paired difference of the two methods."""


@dataclass(frozen=True)
class Effect:
    """How much a factor's variant changes the gain."""

    variant: str
    gain: Interval  # of the variant's concepts themselves
    effect: Interval | None  # less the usual variant's; None: of the usual one


def gains(points: Sequence[GridPoint], method: str, baseline: str, setting: str, metric: str = DINO_I) -> Gains:
    """Return every concept's paired differences of two methods in a setting.

    Raises:
        UserError: the grid has no such methods or setting, or a point is not done.
    """
    found: Gains = {}
    for concept in dict.fromkeys(point.concept for point in points):
        both = []
        for name in (method, baseline):
            own = [p for p in points if (p.concept, p.method, p.setting) == (concept, name, setting)]
            if not own or not own[0].result.is_file():
                raise UserError(f"no result of {concept}/{name} with {setting}: run the suite to its end first")
            both.append(Scores.load(own[0].result))
        (found[concept],) = gains_of(both[0], both[1], metric).values()
    return found


def gains_of(run: Scores, baseline: Scores, metric: str = DINO_I) -> Gains:
    """Return every concept's paired differences of two rows of reports.

    Raises:
        UserError: the rows have no image in common, or not this metric.
    """
    pairs = paired_differences(run, baseline).get(metric)
    if pairs is None:
        raise UserError(f"no {metric} in the results: expected a metric of the suite")
    found: Gains = {}
    for row, value in pairs:
        found.setdefault(row.concept, {})[row.prompt, row.noise] = value
    return found


def runs_by_variant(points: Sequence[GridPoint], setting: str) -> list[RunScores]:
    """Return the scores of each method and variant, pooled over the nouns; a run is called "METHOD, VARIANT".

    Concepts that are not called NOUN-VARIANT, of a noun that has its usual one, are left out.
    """
    parts: dict[tuple[str, str], dict[str, Scores]] = {}
    concepts = {point.concept for point in points}
    for point in points:
        noun, _, variant = point.concept.rpartition("-")
        if f"{noun}-{USUAL}" in concepts and point.setting == setting:
            parts.setdefault((point.method, variant), {})[noun] = Scores.load(point.result)
    return [RunScores(f"{method}, {variant}", pool(own), method) for (method, variant), own in parts.items()]


def effects(found: Gains) -> list[Effect]:
    """Return the effect of every variant of concepts that are named NOUN-VARIANT.

    Raises:
        UserError: no concept is the usual one of a noun.
    """
    parts = {concept: tuple(concept.rsplit("-", 1)) for concept in found if "-" in concept}
    variants = dict.fromkeys(variant for _, variant in parts.values())
    if USUAL not in variants:
        raise UserError(f"no concept is called NOUN-{USUAL}: make the study's concepts first")
    listed = []
    for variant in variants:
        own = {noun: found[concept] for concept, (noun, name) in parts.items() if name == variant}
        usual = {noun: found[f"{noun}-{USUAL}"] for noun in own if f"{noun}-{USUAL}" in found}
        less = {
            noun: {place: value - usual[noun][place] for place, value in own[noun].items() if place in usual[noun]}
            for noun in usual
        }
        listed.append(Effect(variant, _mean(own), None if variant == USUAL else _mean(less)))
    return listed


def _mean(by_noun: Gains) -> Interval:
    rows = [(noun, *place, value) for noun, values in by_noun.items() for place, value in values.items()]
    nouns, prompts, noises, values = zip(*rows, strict=True)
    return bootstrap_mean(values, {"concept": nouns, "prompt": prompts, "seed": noises})


def rank_correlation(traits: Mapping[str, float], found: Gains, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return Spearman's correlation of a trait and the concepts' gains, with its percentile interval over concepts.

    Args:
        traits: concept -> value.

    Raises:
        UserError: fewer than four concepts.
    """
    names = [name for name in found if name in traits]
    if len(names) < 4:
        raise UserError(f"{len(names)} concepts with a trait: expected 4 or more for a correlation")
    x = np.array([traits[name] for name in names])
    y = np.array([np.mean(list(found[name].values())) for name in names])
    generator = np.random.default_rng(seed)
    drawn = [_spearman(x[i], y[i]) for i in generator.integers(0, len(x), (resamples, len(x)))]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(_spearman(x, y), float(low), float(high), len(names))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks; NaN where one of them has no spread."""
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean."""
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(number) - (number + 1) / 2)[place]
