"""Solvers: whole trajectories against diffusers' schedulers of the same name, and closed forms."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from helpers import mostly_slow

from ldm.config import ScheduleConfig
from ldm.errors import UserError
from ldm.sampling_loop import solve
from ldm.schedule import alphas_cumprod, q_sample, trailing_timesteps, zero_terminal_snr
from ldm.solvers import SOLVERS
from ldm.text_to_image import solver_name

ALPHAS = alphas_cumprod(ScheduleConfig())

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
}


def scheduler_of(name, prediction, spacing, steps, **more):
    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        **settings,
        **more,
    )
    scheduler.set_timesteps(steps)
    return scheduler


class Model(torch.nn.Module):
    """Something smooth that depends on x and t."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.conv(x)) / (1 + float(t) / 1000) + 0.3 * x


def theirs(scheduler, model, noise, draws, eta=0.0):
    """Return diffusers' final sample from N(0, 1) noise, each step's noise given."""
    x = noise * scheduler.init_noise_sigma
    options = {"eta": eta} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    for t, draw in zip(scheduler.timesteps, draws, strict=True):
        output = model(scheduler.scale_model_input(x, t), t)
        if isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler):
            with pytest.MonkeyPatch.context() as patch:
                module = diffusers.schedulers.scheduling_euler_ancestral_discrete
                patch.setattr(module, "randn_tensor", lambda *_, draw=draw, **__: draw)
                x = scheduler.step(output, t, x).prev_sample
        else:
            noise_given = {"variance_noise": draw} if options else {}
            x = scheduler.step(output, t, x, **options, **noise_given).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in SOLVERS), ("ddim", 0.6), ("ddim", 1.0)])
@pytest.mark.parametrize("steps", [10, 20])
def test_trajectories_equal_diffusers(name, eta, prediction, spacing, steps):
    scheduler = scheduler_of(name, prediction, spacing, steps)
    solver = SOLVERS[name](ALPHAS, steps, eta, prediction, spacing)
    assert solver.timesteps == scheduler.timesteps.tolist()
    model, noise = Model(), torch.randn(2, 4, 8, 8)
    draws = torch.randn(len(solver.timesteps), *noise.shape)
    given = iter(draws)
    ours, _ = solve(solver, model, solver.initial_scale * noise, range(len(draws)), noise=lambda: next(given))
    expected = theirs(scheduler, model, noise, draws, eta)
    assert ((ours - expected).abs().max() / expected.abs().max()).item() < 1e-4


USUAL = {"dpm++2m": "linspace", "dpm++2m-karras": "linspace"}
"""Spacings that diffusers' classes have by themselves; the others are compared as Stable Diffusion's files set them."""

ENDS = [1, 2, 3, 200, 333, 500, 999, 1000]


def falls(values):
    return all(a > b for a, b in itertools.pairwise(values))


@torch.no_grad()
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("spacing", "steps"),
    mostly_slow(
        [*((None, steps) for steps in ENDS), *itertools.product(["leading", "trailing"], [1, 3, 999, 1000])],
        *((None, steps) for steps in ENDS[:4]),
        ("trailing", 3),
    ),
)
def test_any_number_of_steps_falls_from_noise_to_the_image(name, spacing, steps):
    solver = SOLVERS[name](ALPHAS, steps, spacing=spacing)
    visited = solver.timesteps[:1] + solver.timesteps[2:] if name == "plms" and steps > 1 else solver.timesteps
    assert len(visited) == steps
    if name == "dpm++2m-karras":
        assert visited == sorted(visited, reverse=True)  # rounded from noise levels, which fall
        assert falls([-alpha for alpha in solver.alphas])
    else:
        assert falls(visited)
    assert 0 <= visited[-1] <= visited[0] <= 999
    if name.startswith("dpm") and spacing is None:
        assert solver.timesteps[0] == 999  # at the noisiest, so that DCI's early phase has its steps
    scheduler = scheduler_of(name, "eps", spacing or USUAL.get(name, "leading"), steps)
    model, noise = Model(), torch.randn(1, 4, 4, 4)
    draws = torch.randn(len(solver.timesteps), *noise.shape)
    given = iter(draws)
    ours, _ = solve(solver, model, solver.initial_scale * noise, range(len(draws)), noise=lambda: next(given))
    assert ours.isfinite().all()
    assert 0.01 < ours.std() < 100
    theirs_can = max(scheduler.timesteps) < 1000 and scheduler.timesteps.tolist() == solver.timesteps
    assert theirs_can or steps >= 999  # diffusers leaves the schedule, or repeats timesteps
    uneven = name in ("ddim", "plms") and spacing == "trailing" and 1000 % steps
    if theirs_can and not uneven:  # there diffusers takes the interval, rounded, for the next timestep
        expected = theirs(scheduler, model, noise, draws)
        assert ((ours - expected).abs().max() / expected.abs().max()).item() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("name", "prediction"), [("ddim", "v"), ("dpm++2m", "v"), ("euler", "v"), ("euler", "eps")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_zero_terminal_snr_equals_diffusers(name, prediction, spacing):
    scheduler = scheduler_of(name, prediction, spacing, 10, rescale_betas_zero_snr=True)
    solver = SOLVERS[name](zero_terminal_snr(ALPHAS), 10, 0.0, prediction, spacing)
    model, noise = Model(), torch.randn(2, 4, 8, 8)
    draws = torch.randn(len(solver.timesteps), *noise.shape)
    ours, _ = solve(solver, model, solver.initial_scale * noise, range(len(draws)))
    expected = theirs(scheduler, model, noise, draws)
    assert ((ours - expected).abs().max() / expected.abs().max()).item() < 1e-4


def test_zero_terminal_snr_keeps_the_first_and_ends_in_noise():
    rescaled = zero_terminal_snr(ALPHAS)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(ALPHAS[0].item(), rel=1e-6)
    assert (rescaled[1:] < rescaled[:-1]).all()
    torch.testing.assert_close(alphas_cumprod(ScheduleConfig(zero_terminal_snr=True)), rescaled, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("skip", [0, 3, 19])
def test_with_the_true_noise_every_solver_returns_to_the_image(name, skip):
    """x_0 and the noise are those of one image: the deterministic solvers end at the image itself."""
    x_0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    solver = SOLVERS[name](ALPHAS, 20, skip=skip)
    first = solver.alphas[0] ** 0.5 * x_0 + (1 - solver.alphas[0]) ** 0.5 * noise

    def denoise(x, t):
        """The noise that x holds, whatever was added to it."""
        alpha = alphas_of[x.data_ptr()]
        return (x - alpha**0.5 * x_0) / (1 - alpha) ** 0.5

    alphas_of = {first.data_ptr(): solver.alphas[0]}
    kept = []  # so that no address is used twice

    def after(x, i):
        kept.append(x)
        alphas_of[x.data_ptr()] = solver.alphas[i + 1]
        return x

    draws = range(len(solver.timesteps))
    last, _ = solve(solver, denoise, first, draws, noise=lambda: torch.randn_like(first), after=after)
    end = x_0 if solver.ends_clean else q_sample(x_0, noise, ALPHAS[:1])
    torch.testing.assert_close(last, end, rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_a_stacked_state_goes_on_as_one_entry(name, cut):
    """As DCI does: two states as one, sliced to the first after some steps."""
    solver = SOLVERS[name](ALPHAS, 10)
    model, first = Model(), torch.randn(2, 1, 4, 8, 8)
    draws = torch.randn(len(solver.timesteps), *first.shape)

    def both(state, t):
        return torch.stack([model(state[0], t), model(state[1], t) + 1])

    alone, _ = solve(solver, model, first[0], range(len(draws)), noise=iter(draws[:, 0]).__next__)
    given = iter(draws)
    state, history = solve(solver, both, first, range(cut), noise=lambda: next(given))
    rest = range(cut, len(draws))
    last, _ = solve(solver, model, state[0], rest, solver.branch(history, 0), noise=lambda: next(given)[0])
    torch.testing.assert_close(last, alone)


@pytest.mark.parametrize("steps", [1, 3, 10, 50, 300, 1000])
def test_trailing_timesteps(steps):
    visited = trailing_timesteps(steps)
    assert len(visited) == steps
    assert visited[0] == 999
    assert visited == sorted(set(visited), reverse=True)
    assert np.allclose(np.diff(visited), -1000 / steps, atol=1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_few_steps(name, steps, spacing):
    solver = SOLVERS[name](ALPHAS, steps, spacing=spacing)
    assert all(0 <= t < 1000 for t in solver.timesteps)
    x, _ = solve(solver, lambda x, t: x, torch.ones(2), range(len(solver.timesteps)), noise=lambda: torch.ones(2))
    assert x.isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(name, steps):
    with pytest.raises(UserError, match=f"steps {steps}: expected 1 to"):
        SOLVERS[name](ALPHAS, steps)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("DDIM", "ddim"),
        ("dpmpp_2m", "dpm++2m"),
        ("dpm++_2m_karras", "dpm++2m-karras"),
        ("DPM++", "dpm++2m"),
        ("euler_a", "euler-a"),
        ("euler-ancestral", "euler-a"),
        ("pndm", "plms"),
    ],
)
def test_usual_names_of_solvers(given, found):
    assert solver_name(given) == found


def test_an_unknown_solver_names_the_nearest_if_one_is_near():
    with pytest.raises(UserError, match="solver 'eular': expected one of ddim, .*; did you mean 'euler'?"):
        solver_name("eular")
    with pytest.raises(UserError, match=r"solver 'foo': expected one of ddim, [^;]*$"):
        solver_name("foo")
