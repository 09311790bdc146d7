"""What the Draw tab asks for: as a request of the pipeline, as a command, and as Python."""

from dataclasses import dataclass
from typing import Any

from dci.app.shelf import Entry
from dci.app.studio import Weights
from dci.dual_branch.options import DUAL_BRANCH
from dci.pipeline import Request
from ldm.errors import UserError
from ldm.shipped import program
from ldm.texts import shell_words

MOST_IMAGES, MOST_STEPS, LONGEST_PROMPT = 4, 200, 2000


@dataclass(frozen=True)
class Wanted:
    """The fields of the tab."""

    prompt: str
    agg_time: float
    agg_lambda: float
    auxiliary_noun: str
    scale: float
    steps: int
    solver: str
    seed: int
    n: int

    @staticmethod
    def of(
        prompt: Any,
        agg_time: Any,
        agg_lambda: Any,
        auxiliary_noun: Any,
        scale: Any,
        steps: Any,
        solver: Any,
        seed: Any,
        n: Any,
    ) -> "Wanted":
        """Read what a browser sent.

        Raises:
            UserError: a number is missing, or so large that others would wait too long.
        """
        try:
            floats = [float(value) for value in (agg_time, agg_lambda, scale)]
            whole = [int(value) for value in (steps, seed, n)]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError("a number is missing: fill in T_a, lambda, guidance, steps, seed and images") from error
        prompt, noun = str(prompt or ""), str(auxiliary_noun or "").strip()
        if len(prompt) + len(noun) > LONGEST_PROMPT:
            raise UserError(f"the prompt is longer than {LONGEST_PROMPT} characters: shorten it")
        for name, value, most in (("steps", whole[0], MOST_STEPS), ("images", whole[2], MOST_IMAGES)):
            if not 1 <= value <= most:
                raise UserError(f"{name} {value}: expected 1 to {most}")
        return Wanted(prompt, floats[0], floats[1], noun, floats[2], whole[0], str(solver), whole[1], whole[2])

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the sampler and of DCI."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "scale": self.scale,
            "solver": self.solver,
            "agg_time": self.agg_time,
            "agg_lambda": self.agg_lambda,
        }

    def request(self, dci: bool) -> Request:
        """Return what the pipeline is asked for: with DCI, or without it from the same noise."""
        noun = (self.auxiliary_noun or None) if dci else None
        return Request(self.prompt, self.n, dci=dci, auxiliary_noun=noun, settings=self.settings)


def command(wanted: Wanted, entry: Entry, weights: Weights, dci: bool = True, maps: bool = False) -> str:
    """Return the command whose images are the page's, byte for byte.

    Args:
        maps: save the branch weights too: where watching them takes other kernels, equal bytes need it.
    """
    words = [*_given("--concept", entry.path)]
    words += [*_given("--class-noun", entry.class_noun), *_given("--trigger", entry.trigger)]
    words += [*_given("--prompt", wanted.prompt), "--n-samples", str(wanted.n)]
    settings = wanted.settings if dci else {k: v for k, v in wanted.settings.items() if k not in DUAL_BRANCH}
    words += [word for name, value in settings.items() for word in _given(f"--{name.replace('_', '-')}", value)]
    words += _given("--auxiliary-noun", wanted.auxiliary_noun) if dci else ["--no-dci"]
    words += [word for name in ("model", "checkpoint", "vae") for word in _given(f"--{name}", getattr(weights, name))]
    words += ["--save-maps"] if maps and dci else []
    return f"{program('sample_dci.py', 'sample')} {shell_words(words)}"


def python(wanted: Wanted, entry: Entry, weights: Weights) -> str:
    """Return the lines of Python whose images are the page's, pixel for pixel."""
    load = {name: getattr(weights, name) for name in ("model", "checkpoint", "vae")}
    load |= {"class_noun": entry.class_noun, "trigger": entry.trigger}
    call = {"n": wanted.n, **wanted.settings, "auxiliary_noun": wanted.auxiliary_noun}
    return "\n".join(
        [
            "from dci import Pipeline",
            "",
            f"pipeline = Pipeline.load({_arguments(entry.path, load)})",
            f"options = dict({_arguments(None, call)})",
            f"images = pipeline({wanted.prompt!r}, **options)",
            f"plain = pipeline({wanted.prompt!r}, dci=False, **options)",
        ]
    )


def _given(option: str, value: Any) -> list[str]:
    """An option and its value as words; a text that would look like an option goes into one word with it."""
    if value in (None, ""):
        return []
    text = str(value)
    return [f"{option}={text}"] if isinstance(value, str) and text.startswith("-") else [option, text]


def _arguments(first: str | None, named: dict[str, Any]) -> str:
    given = [f"{name}={value!r}" for name, value in named.items() if value not in (None, "")]
    return ", ".join([*([] if first is None else [repr(first)]), *given])
