# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer against differences written out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from disca.cache import build_policy
from disca.cache.differences import Differences
from disca.cache.store import Store
from disca.cache.taylorseer import TaylorSeer
from disca.errors import UserError
from disca.sample import flow_shift_schedule
from tests.model.cache_hosts import (
    LAYOUTS,
    RESOURCES,
    TableBlock,
    TableHost,
    sample,
    tiny_case,
    uniform,
)

PIXELS = torch.tensor([2.0, -1.0, 0.5, 3.0]).view(1, 1, 1, 2, 2)
SCOPES = ["sublayers", "whole", "last"]

# What attention returns at the times of seven steps; the MLP returns ten times as much.
ATTENTION = {1.0: 1.0, 0.8: 90.0, 0.6: 3.0, 0.4: 90.0, 0.2: 9.0, 0.1: 90.0, 0.05: 2.0}
TIMES = [*ATTENTION, 0.0]


def table_host():
    return TableHost(TableBlock(ATTENTION.__getitem__, lambda t: 10 * ATTENTION[t]))


def skipped_update(result, step):
    """What the sub-layers together added before the gate t, from velocity = x + t * update."""
    before = result.trajectory[step - 1]
    velocity = (before - result.trajectory[step]) / (TIMES[step] - TIMES[step + 1])
    return ((velocity - before) / TIMES[step]).flatten()


@pytest.mark.parametrize(
    ("order", "update"),
    [
        (0, 9.0),
        (1, 9.0 + (9.0 - 3.0) / 2),
        # Second difference: ((9 - 3) / 2 - (3 - 1) / 2) / 2 = 1, of which k^2 / 2! is taken.
        (2, 9.0 + (9.0 - 3.0) / 2 + 1.0 / 2),
    ],
)
def test_steps_by_hand(order, update):
    """Full at 0, 2, 4, 6; at step 5, one after step 4, the series of the last full ones."""
    host = table_host()
    result = sample(host, TaylorSeer(2, order=order), PIXELS, TIMES)
    assert result.report.computed == (0, 2, 4, 6)
    assert result.report.skipped == (1, 3, 5)
    assert host.blocks[0].calls == {"attention": 4, "mlp": 4}
    torch.testing.assert_close(skipped_update(result, 5), torch.full((4,), 11 * update))
    # At step 1 there is one full step to go by, at step 3 there are two.
    torch.testing.assert_close(skipped_update(result, 1), torch.full((4,), 11 * 1.0))
    third = 3.0 + (3.0 - 1.0) / 2 if order else 3.0
    torch.testing.assert_close(skipped_update(result, 3), torch.full((4,), 11 * third))


def test_first_steps_start_the_differences_anew():
    """With first = 3 the first difference is that of steps 2 and 1, and there is no second yet."""
    values = {1.0: 1.0, 0.8: 4.0, 0.6: 16.0, 0.4: 90.0, 0.2: 90.0, 0.1: 90.0, 0.05: 90.0}
    host = TableHost(TableBlock(values.__getitem__, lambda t: 0.0))
    result = sample(host, TaylorSeer(4, order=2, first=3), PIXELS, TIMES)
    assert result.report.computed == (0, 1, 2, 6)
    torch.testing.assert_close(skipped_update(result, 3), torch.full((4,), 16.0 + 12.0))
    torch.testing.assert_close(skipped_update(result, 4), torch.full((4,), 16.0 + 2 * 12.0))


def test_divided_differences_by_hand():
    """Newton's polynomial over t through the last three full steps, of which none is left out."""
    values = {1.0: 1.0, 0.8: 4.0, 0.6: 16.0, 0.4: 90.0, 0.2: 90.0, 0.1: 90.0, 0.05: 90.0}
    host = TableHost(TableBlock(values.__getitem__, lambda t: 0.0))
    policy = TaylorSeer(4, order=2, first=3, differences="divided")
    result = sample(host, policy, PIXELS, TIMES)
    late, early = (16 - 4) / (0.6 - 0.8), (4 - 1) / (0.8 - 1.0)
    second = (late - early) / (0.6 - 1.0)
    at_02 = 16 + late * (0.2 - 0.6) + second * (0.2 - 0.6) * (0.2 - 0.8)
    torch.testing.assert_close(skipped_update(result, 4), torch.full((4,), at_02))


def test_schedule_of_the_paper():
    """N = 6 with four full steps at the start: the 11 of 50 of DisCa's comparison."""
    host = TableHost(TableBlock(lambda t: 1.0, lambda t: t))
    result = sample(host, "taylorseer:interval=6,first=4", PIXELS, uniform(50))
    assert result.report.computed == (0, 1, 2, 3, 9, 15, 21, 27, 33, 39, 45)
    assert len(result.report.skipped) == 39


class Overwrite(nn.Module):
    """A block without sub-layers after which every token is a polynomial in t."""

    def __init__(self, *coefficients):
        super().__init__()
        self.coefficients = coefficients

    def forward(self, state):
        t = state.vec.unsqueeze(-1)
        value = sum(c * t**i for i, c in enumerate(self.coefficients))
        return state.with_tokens(value.expand_as(state.tokens))


def polynomial_host(scope, order):
    """A host of which what ``scope`` forecasts is a polynomial in t of degree ``order``."""
    coefficients = (0.7, -1.3, 2.1)[: order + 1]
    if scope == "last":
        return TableHost(Overwrite(*coefficients))
    # The gate t makes a degree more of what the blocks add together.
    own = coefficients if scope == "sublayers" else coefficients[:order]
    return TableHost(TableBlock(lambda t: sum(c * t**i for i, c in enumerate(own)), lambda t: 0.0))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [1, 2])
def test_divided_is_exact_on_uneven_steps_and_steps_are_not(scope, order):
    schedule = flow_shift_schedule(12, 5.0)
    host = polynomial_host(scope, order)
    plain = sample(host, "none", PIXELS, schedule).x

    def error(differences):
        policy = TaylorSeer(3, order=order, first=3, scope=scope, differences=differences)
        result = sample(host, policy, PIXELS, schedule)
        assert len(result.report.skipped) == 6
        return float((result.x - plain).abs().max())

    assert error("divided") < 1e-4
    assert error("step") > 2e-3


def test_second_order_over_equal_steps_is_off_by_a_term_of_the_gap():
    """F = s^2 at s = 0, 2, 4: the series at 5 is 25 - 2, Newton's polynomial is 25."""
    for divided, expected in ((False, 23.0), (True, 25.0)):
        differences = Differences(Store(), 2, divided=divided)
        for s in (0.0, 2.0, 4.0):
            differences.start(s)
            differences.put("F", torch.tensor(s * s))
        assert float(differences.forecast("F", 5.0)) == pytest.approx(expected)


def forecast_by_hand(host, x, cond, scope, schedule):
    """Steps 0 and 1 full, 2 and 3 with F_1 + k (F_1 - F_0), on the blocks of a DiT."""
    kept = []
    for index, (t, r) in enumerate(pairwise(schedule)):
        start, end = t.expand(len(x)), r.expand(len(x))
        state = before = host.embed(x, start, end if host.mean_flow else None, cond)

        def value(place, computed, index=index):
            if index < 2:
                kept[index][place] = computed()
                return kept[index][place]
            return kept[1][place] + (index - 1) * (kept[1][place] - kept[0][place])

        if index < 2:
            kept.append({})
        if scope == "sublayers":
            for i, block in enumerate(host.blocks):
                attention = value((i, 0), lambda b=block, s=state: b.attention(s))
                if block.parallel:
                    mlp = value((i, 1), lambda b=block, s=state: b.mlp(s))
                    state = block.combine(state, attention=attention, mlp=mlp)
                else:
                    state = block.combine(state, attention=attention)
                    mlp = value((i, 1), lambda b=block, s=state: b.mlp(s))
                    state = block.combine(state, mlp=mlp)
        elif scope == "whole":
            added = value(0, lambda s=before: host.run(s).tokens - s.tokens)
            state = state.with_tokens(state.tokens + added)
        else:
            state = state.with_tokens(value(0, lambda s=before: host.run(s).tokens))
        x = x - (t - r) * host.head(state)
    return x


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_dit_by_hand(layout, scope):
    host, x, cond = tiny_case(LAYOUTS[layout])
    schedule = flow_shift_schedule(4, 3.0)
    policy = TaylorSeer(3, first=2, scope=scope)
    result = sample(host, policy, x, schedule, cond)
    expected = forecast_by_hand(host, x, cond, scope, schedule)
    torch.testing.assert_close(result.x, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(result.x, sample(host, "none", x, schedule, cond).x)

    tokens = host.embed(x, *schedule[:2].expand(2, 2).T, cond).shape if host.mean_flow else None
    tokens = tokens or host.embed(x, schedule[0].expand(2), None, cond).shape
    per_tensor = tokens.numel() * 4
    places = 2 * len(host.blocks) if scope == "sublayers" else 1
    assert result.report.computed == (0, 1)
    assert result.report.skipped == (2, 3)
    assert result.report.cache_bytes == 2 * places * per_tensor
    assert len(result.report.hooked) == places

    again = sample(host, policy, x, schedule, cond)
    assert torch.equal(again.x, result.x)
    assert again.report == result.report


def test_names_of_the_hooked_parts():
    host = table_host()
    names = {scope: sample(host, TaylorSeer(3, scope=scope), PIXELS, TIMES) for scope in SCOPES}
    assert names["sublayers"].report.hooked == ("block 0: attention", "block 0: mlp")
    assert names["whole"].report.hooked == ("all blocks",)
    assert names["last"].report.hooked == ("tokens before the head",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("interval=1", "interval of 1 computes every step"),
        ("interval=3,first=0", "at least the first step is full, got first=0"),
        ("interval=3,order=3", "order is 0, 1 or 2, got 3"),
        ("interval=3,order=-1", "order is 0, 1 or 2, got -1"),
        ("interval=3,scope=all", "setting 'scope'.*'sublayers', 'whole' or 'last'"),
        ("interval=3,differences=time", "setting 'differences'.*'step' or 'divided'"),
        ("order=1", "needs the setting 'interval'"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(UserError, match=message):
        build_policy(f"taylorseer:{spec}", RESOURCES)


def test_bad_settings_without_a_text():
    with pytest.raises(UserError, match="scope is one of sublayers, whole, last, got 'all'"):
        TaylorSeer(3, scope="all")
    with pytest.raises(UserError, match="differences is one of step, divided, got 'time'"):
        TaylorSeer(3, differences="time")


def test_more_full_steps_than_steps():
    with pytest.raises(UserError, match=r"first 7 steps are full and the run has 7"):
        sample(table_host(), TaylorSeer(2, first=7), PIXELS, TIMES)


def test_host_without_sublayers():
    host = TableHost(Overwrite(1.0))
    with pytest.raises(UserError, match=r"block 0 of the host \(Overwrite\) does not expose them"):
        sample(host, TaylorSeer(2), PIXELS, TIMES)
    assert sample(host, TaylorSeer(2, scope="whole"), PIXELS, TIMES).report.skipped == (1, 3, 5)
