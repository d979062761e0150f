# SPDX-License-Identifier: Apache-2.0
"""Schedules and lists of full steps."""

from __future__ import annotations

import pytest
import torch

from disca.errors import UserError
from disca.sample import STEP_LISTS, check_schedule, flow_shift_schedule, resolve_full_steps

# HunyuanVideo's times at 20 steps and shift 5, to the four digits they are usually quoted with.
HUNYUAN_20 = (
    "1 .9896 .9783 .9659 .9524 .9375 .9211 .9028 .8824 .8594 .8333 .8036 .7692 .7292 .6818 .6250 "
    ".5556 .4687 .3571 .2083 0"
)
# Interval lengths of HunyuanVideo-1.5 at 8 steps and shift 7, right to one unit of the last digit.
HUNYUAN15_8 = ".020 .026 .034 .046 .067 .108 .200 .500"


def test_hunyuan_times():
    schedule = flow_shift_schedule(20)
    expected = torch.tensor([float(number) for number in HUNYUAN_20.split()])
    assert schedule.dtype == torch.float32
    assert (schedule - expected).abs().max() <= 0.5e-4 + 1e-6
    assert schedule[0] == 1
    assert schedule[-1] == 0


def test_hunyuan15_intervals():
    intervals = -flow_shift_schedule(8, 7.0).diff()
    expected = torch.tensor([float(number) for number in HUNYUAN15_8.split()])
    assert (intervals - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("steps", [1, 2, 9, 50])
@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_schedule_inverts_the_shift(steps, shift):
    times = flow_shift_schedule(steps, shift).double()
    sigma = times / (shift - (shift - 1) * times)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(sigma, even, atol=1e-6, rtol=0)
    check_schedule(times)


@pytest.mark.parametrize(
    ("steps", "shift", "match"),
    [
        (0, 5.0, "at least 1 step, got 0"),
        (4, 0.0, "above 0, got 0"),
        (4, -1.0, "above 0"),
        (4, float("nan"), "finite"),
        (4, float("inf"), "finite"),
    ],
)
def test_schedule_rejects(steps, shift, match):
    with pytest.raises(UserError, match=match):
        flow_shift_schedule(steps, shift)


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([1.0], "at least 2 times"),
        ([[1.0, 0.0]], "one-dimensional"),
        ([1.5, 0.0], r"in \[0, 1\]"),
        ([1.0, -0.1], r"in \[0, 1\]"),
        ([1.0, float("nan"), 0.0], "finite"),
        ([0.0, 1.0], "decrease"),
        ([1.0, 0.5, 0.5, 0.0], "decrease"),
    ],
)
def test_check_schedule_rejects(times, match):
    with pytest.raises(UserError, match=match):
        check_schedule(torch.tensor(times))


@pytest.mark.parametrize(
    ("spec", "steps", "expected"),
    [
        ("n4", 20, [0, 1, 2, 5, 9, 13, 17, 19]),
        ("ten-full", 20, [0, 1, 2, 5, 9, 11, 13, 15, 17, 19]),
        ("n3", 20, [0, 1, 2, 3, 4, 7, 10, 13, 16, 18, 19]),
        ("n2", 20, [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 19]),
        ("hy15", 8, [0, 2, 4, 7]),
        ("every:4", 10, [0, 4, 8]),
        ("every:1", 3, [0, 1, 2]),
        ("every:99", 3, [0]),
        ("all", 3, [0, 1, 2]),
        ("0", 5, [0]),
        (" 2, 0,1 ", 5, [0, 1, 2]),
        ([3, 0], 5, [0, 3]),
        ((0,), 1, [0]),
    ],
)
def test_full_steps(spec, steps, expected):
    assert resolve_full_steps(spec, steps) == tuple(expected)


@pytest.mark.parametrize(
    ("name", "full", "predicted"), [("n4", 8, 12), ("n3", 11, 9), ("n2", 13, 7)]
)
def test_papers_counts(name, full, predicted):
    steps = STEP_LISTS[name].steps
    assert len(resolve_full_steps(name, steps)) == full
    assert steps - full == predicted


@pytest.mark.parametrize(
    ("spec", "steps", "match"),
    [
        ("n5", 20, "unknown step list 'n5'; known: n4, n3"),
        ("", 20, "unknown step list ''"),
        ("n4", 10, "'n4' is for 20 steps, got 10"),
        ("hy15", 20, "is for 8 steps"),
        ("1,2,3", 20, "must contain step 0"),
        ([1, 2], 20, "must contain step 0"),
        ([], 20, "must contain step 0"),
        ("0,20", 20, "full step 20 is out of range: .* steps 0 to 19"),
        ("0,-1", 20, "full step -1 is out of range"),
        ("0,3,3", 20, "full step 3 is given twice"),
        ("0,two", 20, "cannot read 'two'"),
        ("0,,2", 20, "cannot read ''"),
        ("every:0", 20, "at least 1, got 0"),
        ("every:x", 20, "cannot read 'x'"),
        ("every:", 20, "cannot read ''"),
        ("n4", 0, "at least 1 step"),
    ],
)
def test_full_steps_rejects(spec, steps, match):
    with pytest.raises(UserError, match=match):
        resolve_full_steps(spec, steps)
