"""Which steps, rates and DCI settings each method is given: one rule for all, applied to other concepts.

Every method has the same number of variants to choose from. An axis's unit is the standard deviation of the means of
all methods' variants, sampled plainly, and a run's score is its fidelity plus its editability in these units. Of each
method the variant is taken that scores best with plain sampling, and of that one the DCI setting that scores best: so
DCI is only sampled with the trainings that were chosen.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dci.evaluation.metrics import CLIP_T, DINO_I
from dci.experiments.comparison import PooledRun
from dci.experiments.grid import MethodEntry
from ldm.errors import UserError

RULE = (
    "the highest fidelity (DINO-I) plus editability (CLIP-T), each in standard deviations over all trainings sampled "
    "plainly: first the training, by plain sampling, then the DCI setting of that training"
)


@dataclass(frozen=True)
class Choice:
    """The options that the rule chooses for a method."""

    method: str
    training: list[str]  # options key.sub=value
    sampling: dict[str, Any]  # of DCI
    variants: int  # how many trainings there were to choose from
    settings: int  # how many DCI settings
    fidelity: float  # of the chosen training and setting
    editability: float

    def entry(self, config: str) -> str:
        """Return the line of a suite's configuration."""
        options = ", ".join(f"{name}: {value}" for name, value in self.sampling.items())
        return (
            f"- {{name: {self.method}, config: {config}, training: [{', '.join(self.training)}], "
            f"sampling: {{dci: {{{options}}}}}}}"
        )


def choose(runs: Sequence[PooledRun], methods: Sequence[MethodEntry]) -> list[Choice]:
    """Choose for each family of methods.

    Args:
        runs: all methods' variants, sampled plainly, and those of `choose_trainings` with one or more DCI settings;
            a run's series is its method.

    Raises:
        UserError: as `choose_trainings`, or a chosen training is not there with DCI.
    """
    scored, choices = _scored(runs), []
    for family, training in choose_trainings(runs, methods).items():
        settings = [each for each in scored if each.run.run.series == training and not each.is_plain]
        if not settings:
            raise UserError(f"{family}: no run with DCI to choose from: complete the suite")
        variants = [method for method in methods if _family(method) == family]
        options = next(variant.training for variant in variants if variant.name == training)
        best = max(settings, key=lambda each: each.score)
        sampling = dict(best.run.sampling)
        choices.append(
            Choice(family, list(options), sampling, len(variants), len(settings), best.fidelity, best.editability)
        )
    return choices


def choose_trainings(runs: Sequence[PooledRun], methods: Sequence[MethodEntry]) -> dict[str, str]:
    """Return the name of each family's variant that scores best with plain sampling.

    Raises:
        UserError: a method is not there with plain sampling, or all runs are alike.
    """
    scored, chosen = [each for each in _scored(runs) if each.is_plain], {}
    for family in dict.fromkeys(_family(method) for method in methods):
        names = [method.name for method in methods if _family(method) == family]
        variants = [each for each in scored if each.run.run.series in names]
        if not variants:
            raise UserError(f"{family}: no run without DCI to choose from: complete the suite")
        chosen[family] = max(variants, key=lambda each: each.score).run.run.series
    return chosen


def _family(method: MethodEntry) -> str:
    """The method as it was before its options were varied."""
    return method.family or method.name


@dataclass(frozen=True)
class _Scored:
    run: PooledRun
    is_plain: bool
    fidelity: float
    editability: float
    score: float


def _scored(runs: Sequence[PooledRun]) -> list[_Scored]:
    means = np.array([[run.run.scores.summary[metric].mean for metric in (DINO_I, CLIP_T)] for run in runs])
    plain = np.array([bool(run.sampling.get("no_dci")) for run in runs])
    if not plain.any():
        raise UserError("no run without DCI to choose from: complete the suite, or give it a setting with no_dci")
    units = means[plain].std(0)
    if not (units > 0).all():
        raise UserError("all trainings have the same fidelity or editability: nothing to choose by")
    scores = (means / units).sum(1)
    return [_Scored(run, *row) for run, *row in zip(runs, plain.tolist(), *means.T.tolist(), scores.tolist(), strict=True)]


def as_file(choices: Sequence[Choice]) -> bytes:
    """Return the choices as JSON, with the rule."""
    content = {"rule": RULE, "methods": {choice.method: asdict(choice) for choice in choices}}
    return (json.dumps(content, indent=1) + "\n").encode()
