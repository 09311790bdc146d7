"""Every scheduler of the installed diffusers: with a weight of one for the concept branch, DCI is plain sampling."""

import inspect

import diffusers
import pytest
from calls import latents
from diffusers_world import SCHEDULE, world
from helpers import mostly_slow
from tiny_models import relative_error

from ldm.errors import UserError

OTHER_TIMES = "does not step by training timesteps"
OTHER_OUTPUT = "predicts a velocity, a score or tokens, not noise or v"
OTHER_CALL = "its step takes more than Stable Diffusion's pipelines give"
LEFT_OUT = {
    **dict.fromkeys(
        [
            "AmusedScheduler",
            "BlockRefinementScheduler",
            "DDPMWuerstchenScheduler",
            "DiscreteDDIMScheduler",
            "EntropyBoundScheduler",
            "FlowMapEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "HeliosDMDScheduler",
            "HeliosScheduler",
            "LTXEulerAncestralRFScheduler",
            "MiniMaxH3Scheduler",
            "PiflowScheduler",
            "RFD4ProteinaScheduler",
            "SCMScheduler",
            "ScoreSdeVeScheduler",
            "UnCLIPScheduler",
            "VQDiffusionScheduler",
        ],
        OTHER_OUTPUT,
    ),
    **dict.fromkeys(["CogVideoXDPMScheduler", "KarrasVeScheduler", "RePaintScheduler"], OTHER_CALL),
    **dict.fromkeys(["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"], "needs the package torchsde"),
}
REFUSED = [
    "CMStochasticIterativeScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
]
NAMES = [
    name
    for name in sorted(dir(diffusers))
    if name.endswith("Scheduler") and not name.startswith("Flax") and inspect.isclass(getattr(diffusers, name))
]


@pytest.fixture(scope="module")
def pipe():
    return world("sd1").pipe()


def sampled(pipe, name, **options):
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    pipe.scheduler = kind(**{key: value for key, value in SCHEDULE.items() if key in known})
    return latents(pipe, **options)


@pytest.mark.parametrize(
    "name",
    mostly_slow([n for n in NAMES if n not in (*LEFT_OUT, *REFUSED)], "DDIMScheduler", "EulerAncestralDiscreteScheduler"),
)
def test_a_weight_of_one_is_the_plain_pipeline(pipe, name):
    """The stochastic ones too: the concept branch meets the same noise with DCI and without."""
    plain = sampled(pipe, name, dci=False)
    assert relative_error(sampled(pipe, name, agg_lambda=-1e6, agg_time=0.5), plain) < 1e-5
    assert relative_error(sampled(pipe, name, agg_time=0.5), plain) > 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name in REFUSED])
def test_other_times_are_refused(pipe, name):
    with pytest.raises(UserError, match=OTHER_TIMES):
        sampled(pipe, name)
