# SPDX-License-Identifier: Apache-2.0
"""The policies that see only input and output: EasyCache and PrediT by hand, what CFG refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from disca.cache import build_policy
from disca.cache.easycache import EasyCache
from disca.cache.guided import Guided
from disca.cache.predit import PrediT
from disca.errors import UserError
from disca.models import DiT
from disca.sample import flow_shift_schedule
from tests.model.cache_hosts import LAYOUTS, RESOURCES, sample, tiny_case, uniform
from tests.model.tiny import config


@dataclass
class ScriptedHost:
    """A host whose velocity is one number everywhere, looked up by time."""

    values: dict[float, float]
    mean_flow: bool = False

    def embed(self, x: Tensor, t: Tensor, r: Tensor | None, cond: None) -> tuple[Tensor, Tensor]:
        return x, t

    def run(self, state, start=0, stop=None):
        return state

    def head(self, state):
        x, t = state
        return torch.full_like(x, self.values[round(float(t[0]), 6)])


@dataclass
class PolynomialHost(ScriptedHost):
    """A host whose velocity is a polynomial in t, coefficients in ascending order, times 1 and -2.

    The two samples of a batch then differ.
    """

    def head(self, state):
        x, t = state
        value = sum(c * t.double() ** i for i, c in self.values.items())
        return (value * torch.tensor([1.0, -2.0]).double()).view(-1, 1, 1, 1, 1).expand(x.shape)


ZERO = torch.zeros(1, 1, 1, 2, 2)
TENTHS = uniform(10)


def samples(result):
    """The sample after each step, of which all pixels are equal."""
    return [float(x.mean()) for x in result.trajectory]


def test_easycache_by_hand():
    """Ten steps of 0.1: v(1) = 1, v(0.9) = 2, steps 3 and 9 computed again.

    Step 2: k = |2 - 1| / |-0.1| = 10, x moved by 0.2, so e = 10 * 0.2 / 2 = 1 < 1.5: skipped, with
    output -0.3 + 2 + 0.1. Step 3: x moved by 0.18, e = 1 + 10 * 0.18 / 2 = 1.9: computed, v = 1,
    and k = |1 - 2| / |-0.48 + 0.1|. From step 4 on e adds 0.1 / 0.38 times 1, 0.9, 0.81, ... and
    is 1.078 after step 8; step 9 is the last.
    """
    host = ScriptedHost({1.0: 1.0, 0.9: 2.0, 0.7: 1.0, 0.1: 5.0})
    result = sample(host, EasyCache(1.5, first=2), ZERO, TENTHS)
    assert result.report.computed == (0, 1, 3, 9)
    assert result.report.skipped == (2, 4, 5, 6, 7, 8)
    third = -0.3 - 0.1 * (-0.3 + 2 + 0.1)
    fourth = third - 0.1
    fifth = fourth - 0.1 * (fourth + 1 - third)
    assert samples(result)[:6] == pytest.approx(
        [-0.1, -0.3, third, fourth, fifth, fifth - 0.1 * (fifth + 1 - third)], abs=1e-6
    )
    # The input of the step before, and input and output of the last computed step: 4 pixels each.
    assert result.report.cache_bytes == 3 * 4 * 4
    assert result.report.hooked == ("velocity",)


def test_easycache_counts_the_error_from_the_last_computed_step():
    """The run above, step 2 at e = 1 still below the threshold and step 8 at 1.078 above."""
    host = ScriptedHost({1.0: 1.0, 0.9: 2.0, 0.7: 1.0, 0.2: 9.0, 0.1: 5.0})
    result = sample(host, EasyCache(1.00001, first=2), ZERO, TENTHS)
    assert result.report.computed == (0, 1, 3, 8, 9)


def test_easycache_computes_its_first_steps_and_needs_two():
    host = ScriptedHost(dict.fromkeys([1.0, 0.9, 0.8, 0.7, 0.1], 1.0))
    assert sample(host, EasyCache(9.0, first=4), ZERO, TENTHS).report.computed == (0, 1, 2, 3, 9)
    assert sample(host, EasyCache(9.0, first=1), ZERO, TENTHS).report.computed == (0, 1, 9)


@pytest.mark.parametrize("threshold", [1e-9, 9.0])
def test_easycache_computes_where_the_rate_is_undefined(threshold):
    """An output of zero never moves the sample, so that the rate would be 0 / 0."""
    host = ScriptedHost(dict.fromkeys([round(0.1 * i, 6) for i in range(1, 11)], 0.0))
    with pytest.raises(UserError, match="skipped 0 of 10 steps: it changed nothing"):
        sample(host, EasyCache(threshold), ZERO, TENTHS)


def adams_bashforth(times, outputs, t):
    """Order 2 over the derivatives at the last two of three nodes, those of their parabola."""
    slope = np.polyder(np.poly1d(np.polyfit(times, outputs, 2)))
    h, w = t - times[2], (t - times[2]) / (times[2] - times[1])
    return outputs[2] + h * ((1 + w / 2) * slope(times[2]) - w / 2 * slope(times[1]))


def test_predit_predicts_with_adams_bashforth():
    times = [1.0, 0.9, 0.6, 0.5, 0.2]
    host = ScriptedHost({1.0: 1.0, 0.9: 4.0, 0.6: 2.0})
    policy = PrediT(99.0, order=2, longest=2)
    result = sample(host, policy, ZERO, [*times, 0.0])
    assert result.report.computed == (0, 1, 2)
    predicted = [adams_bashforth(times[:3], [1.0, 4.0, 2.0], t) for t in times[3:]]
    x = -0.1 - 0.3 * 4 - 0.1 * 2
    assert samples(result)[2:] == pytest.approx(
        [x, x - 0.3 * predicted[0], x - 0.3 * predicted[0] - 0.2 * predicted[1]], rel=1e-5
    )
    assert result.report.cache_bytes == 3 * 4 * 4  # three differences of four pixels


def test_predit_predicts_a_line_with_order_1():
    host = ScriptedHost({1.0: 1.0, 0.75: 2.0})
    result = sample(host, PrediT(99.0, order=1, first=2), ZERO, uniform(4))
    assert result.report.computed == (0, 1)
    assert samples(result) == pytest.approx([-0.25, -0.75, -1.5, -2.5])
    assert result.report.cache_bytes == 2 * 4 * 4


@pytest.mark.parametrize("corrector", [0.0, math.inf])
@pytest.mark.parametrize("order", [1, 2])
def test_predit_is_exact_for_polynomials_on_uneven_steps(order, corrector):
    host = PolynomialHost(dict(enumerate((0.7, -1.3, 2.1)[: order + 1])))
    x, schedule = torch.ones(2, 1, 1, 1, 1).double(), flow_shift_schedule(12, 5.0)
    policy = PrediT(99.0, order=order, corrector=corrector)
    result = sample(host, policy, x, schedule)
    assert result.report.computed == (0, 1, 2, 7)
    torch.testing.assert_close(result.x, sample(host, "none", x, schedule).x)


@pytest.mark.parametrize(("corrector", "moved"), [(0.0, True), (1.0, True), (1.1, False)])
def test_predit_corrects_with_adams_moulton(corrector, moved):
    """v = 1, 2, forecast 3, then 6: the line through the 6 has 4 where the forecast was 3.

    The rate at the step of the 6 is |6 - 2| / (2 * 2) = 1, the two being two steps apart.
    """
    host = ScriptedHost({1.0: 1.0, 0.75: 2.0, 0.25: 6.0})
    policy = PrediT(99.0, order=1, longest=1, first=2, corrector=corrector)
    result = sample(host, policy, ZERO, uniform(4))
    assert result.report.computed == (0, 1, 3)
    correction = 0.25 * (3 - 4) if moved else 0.0
    assert samples(result) == pytest.approx([-0.25, -0.75, -1.5, -1.5 + correction - 0.25 * 6])


@pytest.mark.parametrize(
    ("threshold", "order", "computed"),
    [
        # v = 16, 8, 4, ...: halved at each step, so the rate after two neighbours is 1/2.
        (1.0, 1, (0, 1, 3, 5, 7, 9)),  # floor(1 / sqrt(1/2)) = 1
        (1.5, 1, (0, 1, 4, 7)),  # floor(1.5 / sqrt(1/2)) = 2; later rates below 1/2, at most 2
        (1.0, 2, (0, 1, 3, 5, 7, 9)),  # floor(1 / 0.5^(1/3)) = 1
        (0.7, 1, tuple(range(10))),  # floor(0.7 / sqrt(1/2)) = 0
    ],
)
def test_predit_horizon(threshold, order, computed):
    host = ScriptedHost({round(1 - i / 10, 6): 16.0 * 0.5**i for i in range(10)})
    policy = PrediT(threshold, order=order, longest=2, first=2)
    if len(computed) == 10:
        with pytest.raises(UserError, match="skipped 0 of 10 steps: it changed nothing"):
            sample(host, policy, ZERO, TENTHS)
        return
    assert sample(host, policy, ZERO, TENTHS).report.computed == computed


def test_predit_goes_as_far_as_allowed_where_nothing_changes():
    host = ScriptedHost({round(1 - i / 10, 6): 3.0 for i in range(10)})
    result = sample(host, PrediT(1.0, longest=3), ZERO, TENTHS)
    assert result.report.computed == (0, 1, 2, 6)


def velocity(host, x, t, r, cond):
    end = r.expand(len(x)) if host.mean_flow else None
    return host(x, t.expand(len(x)), end, cond)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_dit_by_hand(layout):
    """Four steps of which the third is replaced."""
    host, x, cond = tiny_case(LAYOUTS[layout])
    schedule = flow_shift_schedule(4, 3.0)
    t = schedule
    first = velocity(host, x, t[0], t[1], cond)
    x1 = x - (t[0] - t[1]) * first
    second = velocity(host, x1, t[1], t[2], cond)
    x2 = x1 - (t[1] - t[2]) * second
    replaced = {
        "easycache:threshold=1e9,first=2": x2 + second - x1,
        "predit:threshold=1e9,order=1,longest=1,first=2": second
        + (t[2] - t[1]) * (second - first) / (t[1] - t[0]),
    }
    for spec, third in replaced.items():
        policy = build_policy(spec, RESOURCES)
        result = sample(host, policy, x, schedule, cond)
        assert result.report.computed == (0, 1, 3)
        x3 = x2 - (t[2] - t[3]) * third
        torch.testing.assert_close(result.trajectory[2], x3, rtol=1e-4, atol=1e-5)
        x4 = x3 - (t[3] - t[4]) * velocity(host, x3, t[3], t[4], cond)
        torch.testing.assert_close(result.x, x4, rtol=1e-4, atol=1e-5)
        latents = {"easycache": 3, "predit": 2}[result.report.policy]
        assert result.report.cache_bytes == latents * x.numel() * 4

        again = sample(host, policy, x, schedule, cond)
        assert torch.equal(again.x, result.x)
        assert again.report == result.report


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("easycache:threshold=0", "'easycache': a threshold of 0.0 never skips"),
        ("easycache:threshold=-1", "'easycache': a threshold of -1.0 never skips"),
        ("easycache:threshold=.nan", "'easycache': a threshold of nan never skips"),
        ("easycache:threshold=1,first=0", "at least the first step is computed, got first=0"),
        ("easycache", "needs the setting 'threshold'"),
        ("predit:threshold=0", "'predit': a threshold of 0.0 never skips"),
        ("predit:threshold=.nan", "'predit': a threshold of nan never skips"),
        ("predit:threshold=1,corrector=.nan", "corrector is a rate from 0 on, got nan"),
        ("predit:threshold=1,order=3", "order is 1 or 2, got 3"),
        ("predit:threshold=1,longest=0", "longest=0 never skips"),
        ("predit:threshold=1,first=1", "first two steps are always computed, got first=1"),
        ("predit:threshold=1,corrector=-1", "corrector is a rate from 0 on, got -1.0"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(UserError, match=message):
        build_policy(spec, RESOURCES)


@pytest.mark.parametrize(
    ("policy", "steps", "message"),
    [
        (EasyCache(1.0), 6, "first 5 steps and the last are computed and the run has 6"),
        (EasyCache(1.0, first=1), 3, "first 2 steps and the last are computed and the run has 3"),
        (PrediT(1.0), 3, "first 3 steps are computed and the run has 3"),
    ],
)
def test_runs_too_short_to_skip(policy, steps, message):
    with pytest.raises(UserError, match=message):
        sample(ScriptedHost({}), policy, ZERO, uniform(steps))


def test_guided_refuses_a_model_that_takes_the_scale():
    policy = Guided(lambda batch: None, guidance=4.0)
    policy.reset(DiT(config(guidance_embed=False)), [1.0, 0.0])
    distilled = DiT(config(guidance_embed=True))
    with pytest.raises(UserError, match=r"already distilled into it; .*'none', .* stage 'teacher'"):
        policy.reset(distilled, [1.0, 0.0])


@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_guided_refuses_a_scale_that_is_not_finite(guidance):
    with pytest.raises(UserError, match=f"guidance is a finite scale such as 4, got {guidance}"):
        Guided(lambda batch: None, guidance=guidance)
