# SPDX-License-Identifier: Apache-2.0
"""Samplers over a callable, against closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from disca.cache import CacheReport, StepOutput
from disca.errors import UserError
from disca.sample import cached_sample, cfg_velocity, euler, flow_shift_schedule, mean_velocity

RATE = 1.7


def column(t, x):
    return t.reshape(-1, *[1] * (x.dim() - 1))


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_euler_linear_ode(steps):
    """v = a x: Euler multiplies by the product of (1 - a h)."""
    x, schedule = noise(3, 2, 2, 5, 1), flow_shift_schedule(steps).double()
    factor = (1 - RATE * -schedule.diff()).prod()
    torch.testing.assert_close(euler(lambda x, t: RATE * x, x, schedule), factor * x)


def test_euler_converges_to_the_flow():
    """First order: halving the steps halves the distance to exp(-a)."""
    x = noise(2, 4)
    errors = []
    for steps in (200, 400):
        schedule = flow_shift_schedule(steps, 1.0).double()
        exact = x * torch.exp(torch.tensor(-RATE, dtype=torch.float64))
        errors.append(float((euler(lambda x, t: RATE * x, x, schedule) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_euler_point_mass(steps):
    """One data point: v = (x - x0) / t has straight paths, exact in any number of steps."""
    data, x = noise(3, 1, 2, 4, 4), noise(3, 1, 2, 4, 4).flip(0)
    schedule = flow_shift_schedule(steps).double()
    torch.testing.assert_close(euler(lambda x, t: (x - data) / column(t, x), x, schedule), data)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_mean_velocity_is_exact(steps):
    """The average velocity of v = a x over [r, t] lands on exp(-a) x whatever the steps."""

    def u(x, t, r):
        length = column(t - r, x)
        return x * (1 - torch.exp(-RATE * length)) / length

    x = noise(2, 3, 1, 2, 2)
    exact = x * torch.exp(torch.tensor(-RATE, dtype=torch.float64))
    torch.testing.assert_close(mean_velocity(u, x, flow_shift_schedule(steps).double()), exact)


def test_mean_velocity_pairs_times():
    """Step i is called with t = schedule[i] and r = schedule[i + 1], one of each per sample."""
    seen = []

    def u(x, t, r):
        seen.append((t, r))
        return torch.zeros_like(x)

    schedule = flow_shift_schedule(5)
    mean_velocity(u, torch.zeros(3, 2), schedule)
    for (t, r), (t_want, r_want) in zip(seen, pairwise(schedule), strict=True):
        assert torch.equal(t, t_want.expand(3))
        assert torch.equal(r, r_want.expand(3))


def test_time_dependent_velocity_uses_the_start_of_the_step():
    """v = t: Euler gives the left Riemann sum."""
    schedule = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    x = euler(lambda x, t: column(t, x).expand_as(x), torch.zeros(2, 1).double(), schedule)
    assert x.flatten().tolist() == pytest.approx([-(0.5 * 1 + 0.3 * 0.5 + 0.2 * 0.2)] * 2)


def test_callback_sees_every_step():
    steps = []
    x = euler(lambda x, t: x, noise(2, 3), flow_shift_schedule(4), steps.append)
    schedule = flow_shift_schedule(4)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.t for step in steps] == schedule[:-1].tolist()
    assert [step.r for step in steps] == schedule[1:].tolist()
    assert torch.equal(steps[-1].x, x)
    assert all(step.full for step in steps)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_accumulates_in_float32(dtype, expected):
    """Steps far below a bfloat16 ulp of the sample add up."""
    schedule = flow_shift_schedule(1000, 1.0)
    x = torch.full((2, 3), 8.0, dtype=dtype)
    out = euler(lambda x, t: torch.ones_like(x, dtype=dtype), x, schedule)
    assert out.dtype == expected
    assert out.flatten().tolist() == pytest.approx([7.0] * 6, rel=3e-5)


def test_noncontiguous_noise_is_left_alone():
    big = noise(4, 6, 5)
    x = big[::2, 1::2].transpose(0, 1)
    before = big.clone()
    out = euler(lambda x, t: x, x, flow_shift_schedule(3))
    torch.testing.assert_close(
        out, euler(lambda x, t: x, x.contiguous(), flow_shift_schedule(3)), rtol=0, atol=0
    )
    assert torch.equal(big, before)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.5])
def test_guidance(guidance):
    calls = []

    def model(x, t, r=None, *, cond):
        calls.append(cond)
        return x * cond

    velocity = cfg_velocity(model, cond=3.0, null=2.0, guidance=guidance)
    x = noise(2, 3)
    torch.testing.assert_close(velocity(x, torch.ones(2)), x * (2 + guidance))
    assert sorted(calls) == [2.0, 3.0]


def test_rejects_a_rising_schedule():
    with pytest.raises(UserError, match="must decrease"):
        euler(lambda x, t: x, torch.zeros(1, 1), torch.tensor([0.0, 1.0]))


class Scripted:
    """A policy that subtracts 1 a step and computes the even ones; it keeps what it was given."""

    name = "scripted"
    idle_ok = False

    def __init__(self, hooked=("all",), skips=True):
        self.hooked, self.skips = hooked, skips

    def reset(self, host, schedule):
        self.host, self.schedule, self.given = host, schedule, []

    def advance(self, step):
        self.given.append(step)
        return StepOutput(step.x - 1, step.index % 2 == 0)

    def report(self):
        computed = range(0, len(self.given), 2 if self.skips else 1)
        skipped = range(1, len(self.given), 2) if self.skips else ()
        return CacheReport(self.name, self.hooked, tuple(computed), tuple(skipped), 24)


def test_cached_sample_hands_every_step_to_the_policy():
    policy, schedule, steps = Scripted(), torch.tensor([1.0, 0.6, 0.5, 0.0]), []
    x = noise(2, 3, dtype=torch.bfloat16)
    result = cached_sample("host", policy, x, schedule, "cond", callback=steps.append)
    assert policy.host == "host"
    assert policy.schedule == schedule.tolist()
    for index, step in enumerate(policy.given):
        assert (step.index, step.cond) == (index, "cond")
        assert torch.equal(step.t, schedule[index].expand(2))
        assert torch.equal(step.r, schedule[index + 1].expand(2))
        assert torch.equal(step.x, x.float() - index)
    assert [step.full for step in steps] == [True, False, True]
    assert [(step.t, step.r) for step in steps] == list(pairwise(schedule.tolist()))
    assert torch.equal(steps[1].x, x.float() - 2)
    assert torch.equal(result.x, x.float() - 3)
    assert result.report == CacheReport("scripted", ("all",), (0, 2), (1,), 24)
    assert (result.full_passes, result.predictor_passes, result.cache_bytes) == (2, 1, 24)
    assert result.trajectory == []


def test_cached_sample_keeps_the_trajectory_if_asked():
    x = noise(2, 3)
    result = cached_sample(
        "host", Scripted(), x, flow_shift_schedule(3).double(), None, trajectory=True
    )
    assert [torch.equal(kept, x - i) for i, kept in enumerate(result.trajectory, 1)] == [True] * 3
    assert result.x.dtype == torch.float64


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Scripted(skips=False), "hooked 1 parts of the host and skipped 0 of 3 steps"),
        (Scripted(hooked=()), "hooked 0 parts of the host and skipped 1 of 3 steps"),
    ],
)
def test_cached_sample_refuses_a_policy_that_changed_nothing(policy, message):
    with pytest.raises(UserError, match=message):
        cached_sample("host", policy, noise(2, 3), flow_shift_schedule(3), None)
    policy.idle_ok = True
    assert cached_sample("host", policy, noise(2, 3), flow_shift_schedule(3), None).full_passes
