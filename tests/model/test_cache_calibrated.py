# SPDX-License-Identifier: Apache-2.0
"""TeaCache and MagCache: what a skipped step returns, which steps are, and what is fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from disca.cache import build_policy
from disca.cache.calibration import Calibration, calibrate, weights_digest
from disca.cache.icc import Icc
from disca.cache.magcache import MagCache
from disca.cache.teacache import PUBLISHED, TeaCache
from disca.errors import UserError
from tests.model.cache_hosts import (
    LAYOUTS,
    RESOURCES,
    TableBlock,
    TableHost,
    sample,
    tiny_case,
    uniform,
)

LAYOUT = pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())

MODULATED = [10.0, 11.0, 12.0, 13.0, 20.0, 21.0]
"""By step: changes of 1/10, 1/11, 1/12, 7/13 and 1/20."""


class StepBlock(nn.Module):
    """Modulated input and the update of every token are one number each, looked up by step."""

    def __init__(self, modulated, added, *, replaces=False):
        super().__init__()
        self.table, self.added, self.replaces = modulated, added, replaces

    def _step(self, state):
        return round((1 - float(state.vec[0])) * len(self.table))

    def modulated(self, state):
        return torch.full_like(state.video, self.table[self._step(state)])

    def forward(self, state):
        update = torch.full_like(state.tokens, self.added[self._step(state)])
        return state.with_tokens(update if self.replaces else state.tokens + update)


def step_host(modulated=MODULATED, added=(3.0, 5.0, 7.0, 2.0, 4.0, 6.0), **options):
    return TableHost(StepBlock(list(modulated), list(added), **options))


def noise(batch=1):
    return torch.ones(batch, 1, 2, 1, 2)


def calibration_of(policy, host, steps, tensors):
    times = tuple(uniform(steps).tolist())
    return Calibration(policy, times, (1, 2, 1, 2), weights_digest(host), tensors)


# TeaCache


@pytest.mark.parametrize(
    ("coefficients", "threshold", "full"),
    [
        # 0.1, 0.191 | 0.274 | 0.538 | last. Against the last full step's input, step 2 would be at
        # 0.3 and computed.
        ([1, 0], 0.2, (0, 3, 4, 5)),
        # 0.2, 0.382 | 0.167, 1.24 | last
        ([2, 0], 0.35, (0, 2, 4, 5)),
        # constant: 0.25, 0.5, 0.75, 1 | last
        ([0.25], 1, (0, 4, 5)),
        # a square: 0.01, 0.018, 0.025, 0.315 | last
        ([1, 0, 0], 0.1, (0, 4, 5)),
    ],
)
def test_teacache_adds_up_rescaled_changes(coefficients, threshold, full):
    policy = TeaCache(threshold, coefficients=coefficients)
    report = sample(step_host(), policy, noise(), uniform(6)).report
    assert report.computed == full
    assert report.skipped == tuple(sorted({*range(6)} - {*full}))
    assert report.hooked == ("block 0: modulated input", "video tokens after the blocks")
    assert report.cache_bytes == 2 * 4 * 4  # two tensors of four video tokens of one float32


def test_teacache_adds_the_last_residual():
    result = sample(step_host(), "teacache:threshold=0.2,coefficients=[1, 0]", noise(), uniform(6))
    x, kept = 1.0, None
    for index, added in enumerate((3, 5, 7, 2, 4, 6)):
        kept = added if index in (0, 3, 4, 5) else kept
        x = x - (x + kept) / 6  # the velocity is the video tokens
        torch.testing.assert_close(result.trajectory[index], torch.full((1, 1, 2, 1, 2), x))


def test_teacache_decides_by_the_mean_of_the_batch():
    """One clip alone would be computed at step 1, the other skipped; together they are skipped."""

    class Uneven(StepBlock):
        def modulated(self, state):
            out = super().modulated(state)
            return out if self._step(state) == 0 else out + torch.tensor([3.0, -1.0]).view(2, 1, 1)

    host = TableHost(Uneven([10.0] * 6, [1.0] * 6))
    policy = TeaCache(0.25, coefficients=[1, 0])  # mean|3, -1| / 10 = 0.2
    assert 1 in sample(host, policy, noise(2), uniform(6)).report.skipped


@LAYOUT
def test_teacache_skips_with_the_current_head(config):
    host, x, cond = tiny_case(config)
    times = uniform(3)
    result = sample(host, TeaCache(1e9, coefficients=[1, 0]), x, times, cond)
    assert result.report.computed == (0, 2)
    with torch.no_grad():
        states, samples = [], [x, *result.trajectory]
        for i in (0, 1):
            t, r = times[i].expand(2), times[i + 1].expand(2) if host.mean_flow else None
            states.append(host.embed(samples[i], t, r, cond))
        after = host.run(states[0])
        residual = after.video - states[0].video
        tokens = torch.cat([states[1].video + residual, states[1].text], dim=1)
        expected = samples[1] - (times[1] - times[2]) * host.head(states[1].with_tokens(tokens))
    torch.testing.assert_close(result.trajectory[1], expected, rtol=1e-5, atol=1e-5)
    assert result.report.cache_bytes == 2 * states[0].video.numel() * 4


def test_teacache_fit_finds_the_polynomial():
    """Tokens whose change is 2d² + 0.1 for a change d of the input."""
    changes = [0.05, 0.4, 0.1, 0.3, 0.2, 0.15]
    modulated, out = [1.0], [1.0]
    for change in changes:
        modulated.append(modulated[-1] * (1 + change))
        out.append(out[-1] * (1 + 2 * change**2 + 0.1))
    host = step_host(modulated, out, replaces=True)
    tensors = TeaCache.fit(host, uniform(7).tolist(), [(noise(2), None), (noise(1), None)])
    assert tensors["coefficients"].shape == (5,)
    assert tensors["range"].tolist() == pytest.approx([0.05, 0.4], rel=1e-5)
    assert tensors["input_change"].tolist() == pytest.approx([*changes, *changes], rel=1e-5)
    for change in (0.05, 0.12, 0.25, 0.4):
        fitted = np.polyval(tensors["coefficients"].numpy(), change)
        assert fitted == pytest.approx(2 * change**2 + 0.1, abs=1e-3)
    lines = TeaCache.summary(tensors)
    assert lines[1] == "fitted on 12 pairs of steps, changes of the input 0.05 to 0.4"
    assert float(lines[2].split()[4].rstrip(",")) < 1e-4


def test_teacache_fit_of_a_short_run_has_a_lower_degree():
    host = step_host([1.0, 1.1, 1.3], [1.0, 2.0, 3.0], replaces=True)
    tensors = TeaCache.fit(host, uniform(3).tolist(), [(noise(), None)])
    assert tensors["coefficients"].shape == (2,)  # a line through two pairs
    assert np.polyval(tensors["coefficients"].numpy(), 0.1) == pytest.approx(1.0, rel=1e-4)


def teacache_fit(coefficients, low, high):
    return {
        "coefficients": torch.tensor(coefficients, dtype=torch.float64),
        "range": torch.tensor([low, high], dtype=torch.float64),
    }


def test_teacache_stays_within_the_range_of_its_fit():
    """The change of 7/13 at step 4 counts as 0.1: 0.1, 0.191 | 0.274 | 0.1 | last."""
    host = step_host()
    policy = TeaCache(
        0.25, calibration=calibration_of("teacache", host, 6, teacache_fit([1.0, 0.0], 0.08, 0.1))
    )
    assert sample(host, policy, noise(), uniform(6)).report.computed == (0, 3, 5)


@pytest.mark.parametrize(
    ("coefficients", "least"), [([1.0, 0.1], 0.1), ([1.0, -1.0, 0.35], 0.1), ([-1.0, 1.5], 0.5)]
)
def test_teacache_that_can_never_skip(coefficients, least):
    """Smallest at the left end, in the middle (0.5² - 0.5 + 0.35) and at the right end."""
    host = step_host()
    fit = calibration_of("teacache", host, 6, teacache_fit(coefficients, 0.0, 1.0))
    with pytest.raises(UserError, match=f"moves the output by {least} or more, so .* never skips"):
        sample(host, TeaCache(0.99 * least, calibration=fit), noise(), uniform(6))
    TeaCache(1.01 * least, calibration=fit).reset(host, uniform(6).tolist())


def test_teacache_published_coefficients():
    """The values of HunyuanVideo's polynomial at 0, 0.1 and 0.2."""
    values = np.polyval(PUBLISHED["hunyuanvideo"], [0.0, 0.1, 0.2])
    assert values == pytest.approx([0.0961, 0.1292, 0.1335], abs=2e-3)
    policy = build_policy("teacache:threshold=0.2,coefficients=hunyuanvideo", RESOURCES)
    # p(1/10) = 0.129, then + p(1/11) is over 0.2, and so on: every second step.
    assert sample(step_host(), policy, noise(), uniform(6)).report.computed == (0, 2, 4, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("teacache", "needs the setting 'threshold'"),
        ("teacache:threshold=0,coefficients=[1]", r"never below a threshold of 0.* above 0"),
        ("teacache:threshold=0.1,coefficients=[]", "coefficients is an empty list"),
        ("teacache:threshold=0.1,coefficients=hunyuan", r"no coefficients 'hunyuan'; .*calibrated"),
        ("teacache:threshold=.nan,coefficients=[1]", "never below a threshold of nan"),
        ("teacache:threshold=0.1,coefficients=[1, .nan]", r"are finite .* got \[1.0, nan\]"),
        ("teacache:threshold=0.1,coefficients=[.inf]", r"are finite .* got \[inf\]"),
        ("magcache:threshold=.nan,ratios=[1]", r"skips nothing with threshold nan and max_skip 4"),
        ("magcache:threshold=1,retention=.nan,ratios=[1]", r"from 0 to below 1, got nan"),
        ("magcache:threshold=1,ratios=[1, .nan]", r"numbers above 0, got \[1.0, nan\]"),
        ("magcache:threshold=1,ratios=[.inf]", r"numbers above 0, got \[inf\]"),
        ("magcache:threshold=0,ratios=[1]", r"skips nothing with threshold 0 and max_skip 4"),
        ("magcache:threshold=1,max_skip=0,ratios=[1]", r"threshold 1 and max_skip 0"),
        ("magcache:threshold=1,retention=1,ratios=[1]", r"from 0 to below 1, got 1"),
        ("magcache:threshold=1,ratios=published", r"one number a step, got 'published'"),
        ("magcache:threshold=1,ratios=[1, 0]", r"numbers above 0, got \[1.0, 0.0\]"),
    ],
)
def test_bad_settings(spec, message):
    resources = RESOURCES if "coefficients" in spec or "ratios" in spec else ANY
    with pytest.raises(UserError, match=message):
        build_policy(spec, resources)


ANY = RESOURCES.__class__({}, lambda name: None, RESOURCES.null, 1.0)
"""Resources whose calibrations are missing."""


def test_teacache_refuses_hosts_and_runs():
    policy = TeaCache(0.2, coefficients=[1, 0])
    with pytest.raises(UserError, match=r"reads modulated\(state\) .* has a TableBlock there"):
        sample(TableHost(TableBlock(float, float)), policy, noise(), uniform(6))
    with pytest.raises(UserError, match="the host has no blocks"):
        sample(TableHost(), policy, noise(), uniform(6))
    with pytest.raises(UserError, match="first and the last step, and the run has 2"):
        sample(step_host(), policy, noise(), uniform(2))
    with pytest.raises(UserError, match=r"hooked 2 parts of the host and skipped 0 of 6 steps"):
        sample(step_host(), TeaCache(0.01, coefficients=[1, 0]), noise(), uniform(6))
    zero = step_host([0.0] * 6, [0.0] * 6, replaces=True)
    with pytest.raises(UserError, match="tokens of the host are all zero; train it first"):
        TeaCache.fit(zero, uniform(6).tolist(), [(noise(), None)])


# MagCache


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        # G = 1.1, 1.21 | 0.9, 1.08, 1.08, 1.08 | 1: E = 0.1, 0.31 | 0.1, 0.18, 0.26, 0.34 | 0
        ({"retention": 0}, (0, 2, 6)),
        ({"retention": 0, "max_skip": 2}, (0, 2, 5)),
        # four steps kept, then G = 1.2, 1.2 | 1, 1: E = 0.2, 0.4 | 0, 0
        ({"retention": 0.5}, (0, 1, 2, 3, 5)),
        # int(0.2 * 8) = 1
        ({}, (0, 2, 6)),
    ],
)
def test_magcache_adds_up_deviations(settings, full):
    ratios = [1, 1.1, 1.1, 0.9, 1.2, 1, 1, 1]
    policy = MagCache(0.3, ratios=ratios, **settings)
    host = step_host([1.0] * 8, [3.0] * 8)
    report = sample(host, policy, noise(), uniform(8)).report
    assert report.computed == full
    assert report.skipped == tuple(sorted({*range(8)} - {*full}))
    assert report.hooked == ("video tokens after the blocks",)
    assert report.cache_bytes == 4 * 4  # one tensor of four video tokens of one float32


def test_magcache_adds_the_last_residual():
    host = step_host([1.0] * 4, [3.0, 5.0, 7.0, 2.0])
    policy = MagCache(0.15, ratios=[1, 1.1, 1.2, 0.9], retention=0)  # E: 0.1 | 0.42 | 0.1
    result = sample(host, policy, noise(), uniform(4))
    assert result.report.computed == (0, 2)
    x = 1.0
    for index, kept in enumerate((3, 3, 7, 7)):
        x = x - (x + kept) / 4
        torch.testing.assert_close(result.trajectory[index], torch.full((1, 1, 2, 1, 2), x))


def test_magcache_fit_measures_the_ratios_of_lengths():
    """Residuals of 2, -3, 6 and 3 in every token: lengths in ratios of 1.5, 2 and 0.5."""
    host = step_host([1.0] * 4, [2.0, -3.0, 6.0, 3.0])
    runs = [(noise(2), None), (3 * noise(1), None)]
    made = calibrate("magcache", host, uniform(4), runs)
    assert made.tensors["ratios"].tolist() == pytest.approx([1, 1.5, 2, 0.5], rel=1e-5)
    assert made.tensors["spread"].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-5)
    assert MagCache.summary(made.tensors)[0] == "ratios: [1.0000, 1.5000, 2.0000, 0.5000]"
    policy = MagCache(0.6, calibration=made, retention=0)  # E: 0.5 | 1 | 0.5
    assert sample(host, policy, noise(), uniform(4)).report.computed == (0, 2)


def test_magcache_spread():
    """Two tokens whose lengths grow by 2 and by 4: mean 3, standard deviation 1."""

    class Uneven(StepBlock):
        def forward(self, state):
            scale = 1 + self._step(state) * torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]).view(1, 5, 1)
            return state.with_tokens(state.tokens + scale)

    tensors = MagCache.fit(
        TableHost(Uneven([1.0] * 2, [0.0] * 2)), uniform(2).tolist(), [(noise(), None)]
    )
    assert tensors["ratios"].tolist() == pytest.approx([1, 3], rel=1e-5)
    assert tensors["spread"].tolist() == pytest.approx([0, 1], rel=1e-5)
    assert MagCache.summary(tensors)[1].endswith("mean 1, largest 1 at step 1")


def test_magcache_refuses_runs():
    ratios = [1, 1.5, 1.5, 1.5]
    with pytest.raises(UserError, match="4 ratios were given and the run has 3 steps"):
        sample(step_host(), MagCache(1, ratios=ratios), noise(), uniform(3))
    with pytest.raises(UserError, match=r"threshold 0.4 and retention 0.2 none of the 4 steps"):
        sample(step_host(), MagCache(0.4, ratios=ratios), noise(), uniform(4))
    still = step_host([1.0] * 4, [2.0, 0.0, 0.0, 1.0])
    with pytest.raises(UserError, match="add nothing to some tokens"):
        MagCache.fit(still, uniform(4).tolist(), [(noise(), None)])


# All three, ICC too


@LAYOUT
@pytest.mark.parametrize(
    "spec", ["teacache:threshold=1e9", "magcache:threshold=9", "icc:interval=3,rank=4"]
)
def test_runs_on_both_layouts_and_forgets_the_last_run(config, spec):
    host, x, cond = tiny_case(config)
    asked = []

    def calibration(name):
        asked.append(name)
        return calibrate(name, host, uniform(6), [(x, cond)])

    resources = RESOURCES.__class__({}, calibration, RESOURCES.null, 1.0)
    weights = [parameter.clone() for parameter in host.parameters()]
    policy = build_policy(spec, resources)
    first = sample(host, policy, x, uniform(6), cond)
    again = sample(host, policy, x, uniform(6), cond)
    assert asked == [spec.split(":")[0]]
    assert torch.equal(first.x, again.x)
    assert first.report == again.report
    assert first.report.skipped
    assert not torch.equal(first.x, sample(host, "none", x, uniform(6), cond).x)
    assert all(torch.equal(a, b) for a, b in zip(weights, host.parameters(), strict=True))


@pytest.mark.parametrize("name", ["teacache", "magcache", "icc"])
def test_a_calibration_has_to_fit_the_run(name):
    host, x, cond = tiny_case(LAYOUTS["1.0-plain"])
    fit = calibrate(name, host, uniform(6), [(x, cond)])
    build = {
        "teacache": lambda found: TeaCache(1e9, calibration=found),
        "magcache": lambda found: MagCache(9, calibration=found),
        "icc": lambda found: Icc(2, rank=4, calibration=found),
    }[name]
    command = f"'disca calibrate --policy {name} --model MODEL --steps"
    with pytest.raises(UserError, match=f"is for 6 steps, the run has 5; .*{command} 5"):
        sample(host, build(fit), x, uniform(5), cond)
    with pytest.raises(UserError, match=r"\[3, 2, 4, 4\], the run's are \[3, 2, 4, 2\]"):
        sample(host, build(fit), x[..., :2], uniform(6), cond)
    with pytest.raises(UserError, match=f"'{name}' has no calibration; .*{command} 6"):
        sample(host, build(None), x, uniform(6), cond)
    wrong = Calibration("fora", fit.schedule, fit.shape, fit.host)
    with pytest.raises(UserError, match=f"'{name}' got one of 'fora'; .*{command} 6"):
        sample(host, build(wrong), x, uniform(6), cond)
    with torch.no_grad():
        next(host.parameters()).add_(1)
    with pytest.raises(UserError, match=f"is for weights {fit.host}, the model's are"):
        sample(host, build(fit), x, uniform(6), cond)


@pytest.mark.parametrize(
    ("policy", "missing"),
    [
        (TeaCache(9.0), ["coefficients", "range"]),
        (MagCache(9.0), ["ratios"]),
        (Icc(2, rank=4), ["values.0.left", "values.1.right"]),
        (Icc(2, rank=4, statistics="increments"), ["increments.0.left", "increments.1.left"]),
    ],
    ids=["teacache", "magcache", "icc", "icc-increments"],
)
def test_a_calibration_without_its_tensors_is_refused(policy, missing, tmp_path):
    """Each tensor left out alone, and then all of them."""
    host, x, cond = tiny_case(LAYOUTS["1.0-plain"])
    fit = calibrate(policy.name, host, uniform(6), [(x, cond)], {"model": "cfg"})
    path = tmp_path / "one.safetensors"

    def refused(tensors, message):
        replace(fit, tensors=tensors).save(path)
        policy.calibration = Calibration.load(path)
        with pytest.raises(UserError, match=message):
            sample(host, policy, x, uniform(6), cond)

    command = f"'disca calibrate --policy {policy.name} --model cfg --steps 6 --out DIR'"
    for name in missing:
        rest = {key: tensor for key, tensor in fit.tensors.items() if key != name}
        listed = ", ".join(sorted(rest)[:6])
        refused(rest, rf"lacks the measurement '{name}' \(it has: {listed}\); make .*{command}")
    refused({}, rf"'{policy.name}': .*lacks .* '{missing[0]}' \(it has: none\); .*{command}")
