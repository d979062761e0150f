# SPDX-License-Identifier: Apache-2.0
"""Policies by name, and what it takes to add one."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from disca.cache import POLICIES, CachePolicy, build_policy, policy_class
from disca.cache.registry import parse_spec
from disca.errors import UserError
from disca.sample import cached_sample
from tests.model.cache_hosts import LAYOUTS, RESOURCES, TableBlock, TableHost, tiny_case, uniform


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", ("none", {})),
        (" fora : interval = 6 ", ("fora", {"interval": 6})),
        ("reuse:full_steps=[0, 1, 5]", ("reuse", {"full_steps": [0, 1, 5]})),
        (
            "reuse:full_steps=n4,allow_idle=true",
            ("reuse", {"full_steps": "n4", "allow_idle": True}),
        ),
        ("adacache:codebook={0.1: 4, 1.0: 1}", ("adacache", {"codebook": {0.1: 4, 1.0: 1}})),
        ("pab:", ("pab", {})),
    ],
)
def test_parse(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["fora:interval", "fora:interval=", "fora:[", "fora:=3"])
def test_unreadable(spec):
    with pytest.raises(UserError, match=r"cannot read the policy .*; write name:setting=value"):
        parse_spec(spec)


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_is_a_policy_of_that_name(name):
    cls = policy_class(name)
    assert issubclass(cls, CachePolicy)
    assert cls.name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("forra:interval=3", "unknown policy 'forra'; there are: none, .*; did you mean 'fora'"),
        (
            "fora:intervl=3",
            "'fora' has no setting 'intervl'; it has: interval, first; did you mean",
        ),
        ("none:interval=3", "'none' has no setting 'interval'; it has: none"),
        ("fora:interval=often", "'fora', setting 'interval': .*valid integer.*, got 'often'"),
        ("fora:interval=[2]", "'fora', setting 'interval': .*, got \\[2\\]"),
        ("pab:interval=2,window=[0.1]", "'pab', setting 'window': .*, got \\[0\\.1\\]"),
        ("adacache:part=head", "'adacache', setting 'part': .*'attention' or 'mlp'"),
        ("fora", "'fora' needs the setting 'interval', for example fora:interval=..."),
        ("disca:full_steps=n4", "policy 'disca': no predictor None; there are: none; train one"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(UserError, match=message):
        build_policy(spec, RESOURCES)


def test_values_take_the_type_of_the_setting():
    assert build_policy("fora:interval='3'", RESOURCES).interval.interval == 3
    assert build_policy("pab:interval=2,window=[0.1, 0.85]", RESOURCES).window == (0.1, 0.85)
    assert build_policy("reuse:full_steps=n4", RESOURCES).spec == "n4"


def test_changes_override_the_text():
    policy = build_policy("fora:interval=3,first=2", RESOURCES, {"interval": 5})
    assert (policy.interval.interval, policy.interval.first) == (5, 2)


def test_networks_and_prompts_come_from_the_resources():
    resources = replace(RESOURCES, predictors={"a": max, "b": min}, guidance=6.0)
    assert build_policy("disca:full_steps=n4,predictor=b", resources).predictor is min
    with pytest.raises(UserError, match="no predictor 'c'; there are: a, b"):
        build_policy("disca:full_steps=n4,predictor=c", resources)
    assert build_policy("cfg", resources).guidance == 6
    assert build_policy("cfg:guidance=2", resources).guidance == 2
    assert build_policy("cfg", resources).null is resources.null
    with pytest.raises(UserError, match="has no setting 'null'; it has: guidance"):
        build_policy("cfg", resources, {"null": 3})


NEW_POLICY = '''
    """Leaves the blocks out and adds what the whole stack added at the last computed step."""

    from disca.cache.policy import TokenPolicy


    class Leap(TokenPolicy):
        name = "leap"

        def __init__(self, every: int, *, weight: float = 1.0) -> None:
            self.every, self.weight = every, weight

        def prepare(self):
            return (f"all {len(self.host.blocks)} blocks",)

        def computes(self, step, state):
            return step.index % self.every == 0

        def compute(self, step, state):
            after = self.host.run(state)
            self.store["added"] = after.tokens - state.tokens
            return after

        def skip(self, step, state):
            return state.with_tokens(state.tokens + self.weight * self.store["added"])
'''


@pytest.fixture
def leap(tmp_path, monkeypatch):
    """A policy in a file of its own and one line in POLICIES: nothing else knows of it."""
    (tmp_path / "leap_policy.py").write_text(textwrap.dedent(NEW_POLICY))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(POLICIES, "leap", "leap_policy:Leap")
    yield "leap:every=2,weight=0.5"
    sys.modules.pop("leap_policy", None)


def test_a_new_policy_is_a_file_and_a_line(leap):
    host = TableHost(TableBlock(lambda t: 8.0, lambda t: 2.0))
    x, schedule = torch.zeros(1, 1, 2, 1, 2), torch.tensor([1.0, 0.5, 0.0])
    result = cached_sample(host, build_policy(leap, RESOURCES), x, schedule, None)
    # t = 1: 0 + 10, x = −5; t = ½: −5 + ½·10 = 0, x stays
    assert result.x.unique().tolist() == [-5]
    assert result.report.policy == "leap"
    assert result.report.hooked == ("all 1 blocks",)
    assert (result.report.computed, result.report.skipped) == ((0,), (1,))
    assert result.report.cache_bytes == 5 * 4  # 4 pixels and a text token, float32


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_new_policy_runs_on_every_dit(leap, config):
    host, x, cond = tiny_case(config)
    policy = build_policy(leap, RESOURCES)
    report = cached_sample(host, policy, x, uniform(4), cond).report
    assert (report.computed, report.skipped) == ((0, 2), (1, 3))


def test_a_new_policy_gets_the_errors_of_the_others(leap):
    with pytest.raises(UserError, match="'leap' has no setting 'evry'; it has: every, weight; did"):
        build_policy("leap:evry=2", RESOURCES)
    with pytest.raises(UserError, match="'leap' needs the setting 'every'"):
        build_policy("leap", RESOURCES)
    host = TableHost(TableBlock(lambda t: 8.0, lambda t: 2.0))
    policy = build_policy("leap:every=1", RESOURCES)
    with pytest.raises(UserError, match=r"'leap' hooked 1 .* skipped 0 of 3 steps: it changed no"):
        cached_sample(host, policy, torch.zeros(1, 1, 1, 1, 1), uniform(3), None)
