# SPDX-License-Identifier: Apache-2.0
"""Random times, time pairs and batches of the distillation losses."""

from __future__ import annotations

import math

import pytest
import torch

from disca.data.digits import MovingDigits
from disca.distill.batch import draw_batch, draw_guidance, drop_condition, interpolate
from disca.distill.times import interval_pairs, sample_times, shift_time
from disca.sample.schedule import flow_shift_schedule


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source() -> MovingDigits:
    return MovingDigits(frames=4, size=8, starts="free")


# Times.


@pytest.mark.parametrize("restriction", [0.05, 0.2, 0.4, 1.0])
def test_intervals_stay_within_the_restriction(restriction: float) -> None:
    count = 40_000
    g = generator()
    t = sample_times(count, g)
    r = interval_pairs(t, g, restriction=restriction)
    assert bool((r >= 0).all())
    assert bool((r <= t).all())
    assert float((t - r).max()) <= restriction + 1e-6
    # P(r = 0) = P(t < T) = E[T] = R / 2.
    expected = restriction / 2
    spread = math.sqrt(expected * (1 - expected) / count)
    assert abs(float((r == 0).float().mean()) - expected) < 5 * spread


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_share_of_equal_times(fraction: float) -> None:
    g = generator()
    t = sample_times(20_000, g)
    r = interval_pairs(t, g, restriction=0.2, equal_fraction=fraction)
    assert float((r == t).float().mean()) == pytest.approx(fraction, abs=0.02)


@pytest.mark.parametrize("restriction", [0.0, -0.1, 1.01, math.nan])
def test_restriction_outside_its_range_is_refused(restriction: float) -> None:
    with pytest.raises(ValueError, match=r"restriction R must be in \(0, 1\]"):
        interval_pairs(torch.rand(3), generator(), restriction=restriction)


def test_fraction_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="equal_fraction"):
        interval_pairs(torch.rand(3), generator(), equal_fraction=1.5)


def test_shifted_times_follow_the_sampling_schedule() -> None:
    torch.testing.assert_close(
        shift_time(torch.linspace(1, 0, 21), 5.0), flow_shift_schedule(20, 5.0)
    )
    uniform = sample_times(5, generator())
    shifted = sample_times(5, generator(), distribution="shifted", shift=3.0)
    assert torch.equal(shifted, shift_time(uniform, 3.0))


def test_logit_normal_times() -> None:
    t = sample_times(50_000, generator(), distribution="logit_normal", mean=0.5, std=2.0)
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(logits.std()) == pytest.approx(2.0, abs=0.05)


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="'uniform', 'shifted' or 'logit_normal'"):
        sample_times(3, generator(), distribution="normal")


# Batches.


def test_interpolation_ends_and_middle() -> None:
    x0, noise = torch.randn(3, 1, 2, 4, 4), torch.randn(3, 1, 2, 4, 4)
    x = interpolate(x0, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x[0], x0[0])
    torch.testing.assert_close(x[1], noise[1])
    torch.testing.assert_close(x[2], 0.75 * x0[2] + 0.25 * noise[2])


@pytest.mark.parametrize(("setting", "low", "high"), [((1.0, 8.0), 1.0, 8.0), (4.0, 4.0, 4.0)])
def test_guidance_is_drawn_from_its_range(setting: object, low: float, high: float) -> None:
    scales = draw_guidance(setting, 4000, generator())  # type: ignore[arg-type]
    assert scales is not None
    assert low <= float(scales.min())
    assert float(scales.max()) <= high
    assert float(scales.mean()) == pytest.approx((low + high) / 2, abs=0.15)


def test_guidance_setting_moves_no_other_random_number(source: MovingDigits) -> None:
    draws = []
    for setting in (None, 4.0, (1.0, 8.0)):
        g = generator()
        batch = draw_batch(source, 3, g, guidance=setting)
        draws.append((batch.x0, batch.noise, torch.rand(2, generator=g)))
        assert (batch.condition.guidance is None) == (setting is None)
    for other in draws[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draws[0], other, strict=True))


def test_dropped_conditions_are_the_empty_prompt(source: MovingDigits) -> None:
    batch = draw_batch(source, 4, generator(), guidance=3.0)
    null = source.null(4)
    dropped = torch.tensor([True, False, False, True])
    mixed = drop_condition(batch.condition, null, dropped)
    for row in range(4):
        expected = null if dropped[row] else batch.condition
        for name in ("text", "text_lengths", "pooled"):
            assert torch.equal(getattr(mixed, name)[row], getattr(expected, name)[row])
    assert mixed.guidance is batch.condition.guidance
