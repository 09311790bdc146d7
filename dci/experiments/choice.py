"""Which steps, rates and DCI settings each method is given: one rule for all, applied to other concepts.

Every method has the same number of variants to choose from. Of the runs of all methods, an axis's unit is the
standard deviation of their means, and a run's score is its fidelity plus its editability in these units. Of each
method the variant is taken that scores best with plain sampling, and of that one the DCI setting that scores best.
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
    "the highest fidelity (DINO-I) plus editability (CLIP-T), each in standard deviations over all runs: first the "
    "training, by plain sampling, then the DCI setting of that training"
)


@dataclass(frozen=True)
class Choice:
    """What a method is given."""

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
        runs: of all methods, sampled plainly and with one or more DCI settings; a run's series is its method.

    Raises:
        UserError: a method is not there with plain sampling and with DCI, or all runs are alike.
    """
    points = np.array([[run.run.scores.summary[metric].mean for metric in (DINO_I, CLIP_T)] for run in runs])
    units = points.std(0)
    if not (units > 0).all():
        raise UserError("all runs have the same fidelity or editability: nothing to choose by")
    scored = [(run, *point, float((point / units).sum())) for run, point in zip(runs, points, strict=True)]
    return [
        _choice(family, [method for method in methods if method.family == family], scored)
        for family in dict.fromkeys(method.family for method in methods)
    ]


def _choice(family: str, variants: list[MethodEntry], scored: list[tuple]) -> Choice:
    def best(method: str | None, plain: bool) -> tuple:
        names = [method] if method else [variant.name for variant in variants]
        found = [each for each in scored if each[0].run.series in names and bool(each[0].sampling.get("no_dci")) == plain]
        if not found:
            raise UserError(f"{family}: no run {'without' if plain else 'with'} DCI to choose from: complete the suite")
        return max(found, key=lambda each: each[-1])

    training = best(None, plain=True)[0].run.series
    run, fidelity, editability, _ = best(training, plain=False)
    number = sum(each[0].run.series == training and not each[0].sampling.get("no_dci") for each in scored)
    options = next(variant.training for variant in variants if variant.name == training)
    return Choice(family, list(options), dict(run.sampling), len(variants), number, float(fidelity), float(editability))


def as_file(choices: Sequence[Choice]) -> bytes:
    """Return the choices as JSON, with the rule."""
    content = {"rule": RULE, "methods": {choice.method: asdict(choice) for choice in choices}}
    return (json.dumps(content, indent=1) + "\n").encode()
