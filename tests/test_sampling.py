"""Schedule, samplers, guidance, noise and callbacks."""

from __future__ import annotations

from src.errors import UserError
from src.sampling import Noise, denoise, guided, sd3_sigmas, shifted
from src.sampling.loop import renewed_sigma

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .helpers import relative_error

SHAPE = (4, 6, 3)
steps = st.integers(1, 200)
shifts = st.floats(0.2, 12)


@given(steps, shifts)
def test_schedule_falls_from_one_to_zero(num_steps, shift):
    sigmas = sd3_sigmas(num_steps, shift)
    assert sigmas.dtype == np.float32 and len(sigmas) == num_steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_schedule_is_sd3s():
    """28 steps with shift 3: the sigmas that the published sampler prints."""
    smallest = 3 * 0.001 / (1 + 2 * 0.001)
    even = np.array([1 + i * (smallest - 1) / 27 for i in range(28)])
    wanted = np.append(3 * even / (1 + 2 * even), 0)
    assert np.allclose(sd3_sigmas(28, 3.0), wanted, atol=1e-7)
    assert shifted(0.5, 3.0) == pytest.approx(0.75)


@pytest.mark.parametrize("bad", [0, -3])
def test_no_steps_is_an_error(bad):
    with pytest.raises(UserError, match=f"at least 1, got {bad}"):
        sd3_sigmas(bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_impossible_shift_is_an_error(bad):
    with pytest.raises(UserError, match="shift"):
        sd3_sigmas(4, bad)


def straight(target: mx.array):
    """Velocity of the flow that leads every latent straight to the target."""
    return lambda latent, sigma: (latent - target) / sigma


@given(steps, st.integers(0, 2**32 - 1))
def test_both_samplers_follow_a_straight_flow_to_its_end(num_steps, seed):
    target = mx.array(np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32))
    for sampler in ("euler", "ddim"):
        out = denoise(
            straight(target), Noise([seed]), sd3_sigmas(num_steps), SHAPE, sampler=sampler
        )
        assert relative_error(out, target) < 1e-4


@given(steps, shifts, st.integers(0, 1000))
def test_ddim_without_fresh_noise_is_euler(num_steps, shift, seed):
    def velocity(latent, sigma):
        return mx.sin(3 * latent) + sigma * latent

    sigmas = sd3_sigmas(num_steps, shift)
    runs = [denoise(velocity, Noise([seed]), sigmas, SHAPE, sampler=s) for s in ("euler", "ddim")]
    assert relative_error(runs[1], runs[0]) < 1e-4


@given(st.floats(0.01, 1), st.floats(0.01, 0.99), st.floats(0, 3))
def test_renewed_noise_is_bounded_and_matches_the_gaussian_posterior(sigma, fraction, eta):
    """eta 1: the variance of q(x_s | x_t, x_0) for alpha = 1 - sigma, by precision weighting."""
    following = sigma * fraction
    renewed = renewed_sigma(sigma, following, eta)
    assert 0 <= renewed <= following
    ratio = (1 - sigma) / (1 - following)
    step_variance = sigma**2 - (ratio * following) ** 2
    posterior = 1 / (1 / following**2 + ratio**2 / step_variance)
    assert renewed_sigma(sigma, following, 1.0) == pytest.approx(posterior**0.5, rel=1e-6)


def test_ddim_with_fresh_noise_keeps_the_noise_level():
    """Under the exact model of data N(0, 1) the latent's variance stays (1 − σ)² + σ²."""

    def velocity(latent, sigma):
        return latent * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)

    shape = (64, 64, 16)
    seen = []

    class Watch:
        def step(self, step):
            wanted = (1 - step.next_sigma) ** 2 + step.next_sigma**2
            seen.append((float(mx.var(step.next_latent)), wanted))

    denoise(
        velocity, Noise([3]), sd3_sigmas(100), shape, sampler="ddim", eta=1.0, callbacks=[Watch()]
    )
    assert len(seen) == 100
    assert all(abs(got / wanted - 1) < 0.1 for got, wanted in seen)


def test_noise_is_numpys_channels_first_and_leaves_its_state_alone():
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    noise = Noise([7, 8]).draw(*SHAPE)
    assert np.array_equal(before, np.random.get_state()[1])
    wanted = np.random.RandomState(8).randn(SHAPE[2], SHAPE[0], SHAPE[1]).transpose(1, 2, 0)
    assert np.array_equal(np.array(noise[1]), wanted.astype(np.float32))


def test_a_seeds_noise_does_not_depend_on_its_batch():
    together, alone = Noise([5, 9]), Noise([9])
    for _ in range(3):
        assert mx.array_equal(together.draw(*SHAPE)[1:], alone.draw(*SHAPE))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed_is_an_error(seed):
    with pytest.raises(UserError, match=str(seed)):
        Noise([seed])


def model(latent, text, pooled, timestep):
    """Depends on every input, row by row."""
    return (
        latent * text.mean((1, 2))[:, None, None, None]
        + (pooled[:, 0] * timestep)[:, None, None, None]
    )


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 4.0])
def test_guidance_is_the_formula(weight):
    rng = np.random.default_rng(0)
    latent = mx.array(rng.standard_normal((2, *SHAPE)).astype(np.float32))
    text = mx.array(rng.standard_normal((4, 5, 2)).astype(np.float32))
    pooled = mx.array(rng.standard_normal((4, 2)).astype(np.float32))
    time = mx.full((2,), 300.0)
    prompt = model(latent, text[:2], pooled[:2], time)
    negative = model(latent, text[2:], pooled[2:], time)
    rows = 4 if weight not in (0, 1) else 2
    out = guided(model, latent, mx.array(0.3), text[:rows], pooled[:rows], weight)
    wanted = prompt if weight in (0, 1) else negative + weight * (prompt - negative)
    assert relative_error(out, wanted) < 1e-6


def test_guidance_refuses_what_would_be_wrong():
    latent, text, pooled = mx.zeros((2, *SHAPE)), mx.zeros((2, 5, 2)), mx.zeros((2, 2))
    with pytest.raises(ValueError, match="2 rows of text for 4"):
        guided(model, latent, mx.array(0.3), text, pooled, 4.0)
    for weight in (-1.0, float("nan")):
        with pytest.raises(UserError, match="guidance weight"):
            guided(model, latent, mx.array(0.3), text, pooled, weight)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sampler": "heun"}, "'heun'.*euler, ddim"),
        ({"sampler": "ddim", "eta": -0.1}, "at least 0, got -0.1"),
        ({"sampler": "euler", "eta": 1.0}, "needs the ddim sampler"),
    ],
)
def test_bad_sampler_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        denoise(straight(mx.zeros(SHAPE)), Noise([0]), sd3_sigmas(2), SHAPE, **options)


class Recorder:
    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.steps, self.calls = stop_after, [], []

    def before(self, latent, sigmas):
        self.calls.append("before")
        self.start = latent

    def step(self, step):
        self.steps.append(step)
        if step.index + 1 == self.stop_after:
            raise KeyboardInterrupt

    def after(self, latent):
        self.calls.append("after")
        self.end = latent

    def interrupt(self, latent, done):
        self.calls.append(f"interrupt {done}")
        self.end = latent


def test_callbacks_see_every_step_once_and_in_order():
    recorder, sigmas = Recorder(), sd3_sigmas(5)
    out = denoise(straight(mx.zeros(SHAPE)), Noise([1]), sigmas, SHAPE, callbacks=[recorder])
    assert recorder.calls == ["before", "after"]
    assert [s.index for s in recorder.steps] == [0, 1, 2, 3, 4]
    assert {s.total for s in recorder.steps} == {5}
    assert [s.sigma for s in recorder.steps] == pytest.approx(sigmas[:-1])
    assert [s.next_sigma for s in recorder.steps] == pytest.approx(sigmas[1:])
    assert mx.array_equal(recorder.steps[0].latent, recorder.start)
    for left, right in zip(recorder.steps, recorder.steps[1:], strict=False):
        assert mx.array_equal(left.next_latent, right.latent)
    assert mx.array_equal(recorder.end, out)


def test_interrupt_hands_over_what_was_finished():
    recorder = Recorder(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        denoise(straight(mx.zeros(SHAPE)), Noise([1]), sd3_sigmas(5), SHAPE, callbacks=[recorder])
    assert recorder.calls == ["before", "interrupt 2"]
    assert mx.array_equal(recorder.end, recorder.steps[-1].next_latent)
