# SPDX-License-Identifier: Apache-2.0
"""Calibrations: their file, which runs they fit, how they are made, and ``disca calibrate``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from disca.cache import build_policy
from disca.cache.calibration import Calibration, calibrate, observe, weights_digest
from disca.cli import main
from disca.compare import calibrating
from disca.compare.calibrating import calibration_for, calibration_path, make_calibration
from disca.compare.suite import Sampling, Suite
from disca.data.source import ClipBatch
from disca.errors import UserError
from disca.models import DiT
from tests.model.cache_hosts import LAYOUTS, sample, tiny_case, uniform
from tests.model.tiny import config, inputs, roughen

TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


def measured(**changes):
    """A calibration of a model that nobody has."""
    values = {
        "policy": "teacache",
        "schedule": TIMES,
        "shape": (3, 2, 4, 4),
        "host": "0123456789abcdef",
        "tensors": {"coefficients": torch.tensor([1.0, 2.0]).double(), "range": torch.ones(2)},
        "settings": {"model": "cfg", "clips": 8, "seed": 3, "guidance": 4.5},
    }
    return Calibration(**{**values, **changes})


def test_a_file_holds_all_of_it(tmp_path):
    made = measured()
    assert made.save(tmp_path / "new" / "one.safetensors") == tmp_path / "new" / "one.safetensors"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.safetensors"]
    found = Calibration.load(tmp_path / "new" / "one.safetensors")
    assert replace(found, tensors={}) == replace(made, tensors={})
    assert found.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert found.steps == 4


def test_a_bad_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "one.safetensors"
    with pytest.raises(UserError, match=r"one.safetensors: no such calibration; 'disca calibrate'"):
        Calibration.load(path)
    measured().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"one.safetensors: not a whole calibration file"):
        Calibration.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"not a whole calibration file .*delete it"):
        Calibration.load(path)
    with monkeypatch.context() as patch:
        patch.setattr("disca.cache.calibration.FORMAT", 0)
        measured().save(path)
    with pytest.raises(UserError, match="a calibration of format 0, this version reads 1; delete"):
        Calibration.load(path)


def test_the_weights_are_told_apart():
    model = DiT(config())
    before = weights_digest(model)
    assert weights_digest(DiT.from_teacher(model)) == before
    with torch.no_grad():
        model.final_layer.linear.bias[0] += 1e-3
    assert weights_digest(model) != before


@pytest.mark.parametrize(
    ("schedule", "shape", "message"),
    [
        (
            (1.0, 0.5, 0.0),
            None,
            r"'teacache': the calibration is for 4 steps, the run has 2; make one that fits with "
            r"'disca calibrate --policy teacache --model cfg --steps 2 --out DIR'",
        ),
        (
            (1.0, 0.9, 0.8, 0.5, 0.0),
            None,
            r"visits the time 0.75 where the run visits 0.9 \(another shift\?\); .*--steps 4",
        ),
        (TIMES, (3, 2, 8, 4), r"= \[3, 2, 4, 4\], the run's are \[3, 2, 8, 4\]; make one .*cfg"),
    ],
)
def test_another_run_is_refused(schedule, shape, message):
    measured().check(TIMES, (3, 2, 4, 4))
    measured().check([time + 1e-8 for time in TIMES])
    with pytest.raises(UserError, match=message):
        measured().check(schedule, shape)


def test_another_model_is_refused():
    model = DiT(config())
    digest = weights_digest(model)
    measured(host=digest).check(TIMES, host=model)
    with pytest.raises(
        UserError, match=f"is for weights 0123456789abcdef, the model's are {digest}"
    ):
        measured().check(TIMES, host=model)


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_observed_runs_are_uncached_runs(settings):
    host, x, cond = tiny_case(settings)
    times = uniform(3)
    plain = sample(host, "none", x, times, cond)
    seen = list(observe(host, times.tolist(), [(x, cond), (x.flip(0), cond)]))
    assert [index for index, _, _ in seen] == [0, 1, 2, 0, 1, 2]
    with torch.no_grad():
        for (_, before, after), t, r, start in zip(
            seen, times[:-1], times[1:], [x, *plain.trajectory], strict=False
        ):
            ends = r.expand(2) if host.mean_flow else None
            embedded = host.embed(start, t.expand(2), ends, cond)
            assert torch.equal(before.tokens, embedded.tokens)
            assert torch.equal(after.tokens, host.run(embedded).tokens)
    assert not torch.equal(seen[3][1].tokens, seen[0][1].tokens)


def test_calibrate_notes_what_it_was_made_for():
    host, x, cond = tiny_case(config())
    made = calibrate("magcache", host, uniform(3), [(x, cond)], {"clips": 2})
    assert (made.policy, made.shape, made.settings) == ("magcache", (3, 2, 4, 4), {"clips": 2})
    assert made.schedule == tuple(uniform(3).tolist())
    assert made.host == weights_digest(host)
    made.check(uniform(3).tolist(), (3, 2, 4, 4), host)


def test_calibrate_refuses_what_it_cannot_measure():
    host, x, cond = tiny_case(config())
    with pytest.raises(UserError, match=r"'fora' needs no calibration; .*teacache, magcache, icc"):
        calibrate("fora", host, TIMES, [(x, cond)])
    with pytest.raises(UserError, match=r"unknown policy 'teacash'.*teacache"):
        calibrate("teacash", host, TIMES, [(x, cond)])
    with pytest.raises(UserError, match="at least one clip, got none"):
        calibrate("magcache", host, TIMES, [])
    with pytest.raises(UserError, match=r"one resolution, .*\[3, 2, 4, 4\] and \[3, 2, 4, 2\]"):
        calibrate("magcache", host, TIMES, [(x, cond), (x[..., :2], cond)])
    for policy in ("teacache", "magcache", "icc"):
        with pytest.raises(UserError, match=f"'{policy}' .* a run of 1 has none; .*at least 2"):
            calibrate(policy, host, (1.0, 0.0), [(x, cond)])


class Clips:
    """A source of random conditions that notes which split it was asked for."""

    shape = (3, 2, 4, 4)

    def __init__(self):
        self.splits = []

    def sample(self, n, generator, *, split="train"):
        self.splits.append(split)
        _, _, _, cond = inputs(
            config(), batch=n, text=3, seed=int(torch.randint(99, (), generator=generator))
        )
        return ClipBatch(torch.zeros(n, *self.shape), cond)

    def null(self, batch):
        raise AssertionError("asked for the empty prompt")


@pytest.fixture
def suite():
    host = roughen(DiT(config())).eval()
    return Suite(Clips(), {"cfg": host}, {}, None, Sampling(guidance=3.0, shift=2.0))


def test_a_calibration_is_made_once(suite, tmp_path, monkeypatch):
    made = calibration_for(suite, "magcache", "cfg", 4, tmp_path, clips=5, seed=1)
    assert made.settings == {"model": "cfg", "clips": 5, "seed": 1, "guidance": 3.0}
    assert made.schedule == tuple(suite.schedule(4).tolist())
    assert suite.source.splits == ["train"]
    assert calibration_path(tmp_path, "magcache", "cfg", 4).name == "magcache-cfg-4.safetensors"
    assert Calibration.load(tmp_path / "magcache-cfg-4.safetensors").settings == made.settings
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "calibrate", None)  # a second measurement would fail
        again = calibration_for(suite, "magcache", "cfg", 4, tmp_path, clips=5, seed=1)
    assert torch.equal(again.tensors["ratios"], made.tensors["ratios"])


@pytest.mark.parametrize("change", ["clips", "seed", "guidance", "shift", "weights"])
def test_a_calibration_that_does_not_fit_is_made_again(suite, tmp_path, change):
    asked = {"clips": 2, "seed": 0}
    old = calibration_for(suite, "magcache", "cfg", 3, tmp_path, **asked)
    if change in asked:
        asked[change] += 1
    elif change == "weights":
        roughen(suite.hosts["cfg"], seed=5)
    else:
        suite = replace(suite, sampling=suite.sampling.model_copy(update={change: 1.5}))
    new = calibration_for(suite, "magcache", "cfg", 3, tmp_path, **asked)
    expected = make_calibration(suite, "magcache", "cfg", 3, **asked)
    assert torch.equal(new.tensors["ratios"], expected.tensors["ratios"])
    kept = Calibration.load(calibration_path(tmp_path, "magcache", "cfg", 3))
    assert replace(kept, tensors={}) == replace(expected, tensors={}) != replace(old, tensors={})


def test_bad_numbers(suite):
    for name in ("steps", "clips"):
        with pytest.raises(UserError, match=f"needs {name} of at least 1, got 0"):
            make_calibration(suite, "magcache", "cfg", **{"steps": 3, "clips": 1, name: 0})
    with pytest.raises(UserError, match="needs seed of at least 0, got -1"):
        make_calibration(suite, "magcache", "cfg", 3, seed=-1)
    with pytest.raises(UserError, match="no finished stage 'teacher'; found: cfg"):
        make_calibration(suite, "magcache", "teacher", 3)


def test_the_command_writes_a_file_that_a_policy_takes(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrating, "load_suite", lambda folder, **changes: suite)
    arguments = ["calibrate", "--model", "cfg", "--steps", "4", "--clips", "2", "--out"]
    for policy in ("teacache", "magcache", "icc"):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(tmp_path), "--policy", policy])
        assert stop.value.code == 0
        assert f"wrote {tmp_path / policy}-cfg-4.safetensors" in capsys.readouterr().out
    found = Calibration.load(tmp_path / "magcache-cfg-4.safetensors")
    policy = build_policy("magcache:threshold=9,max_skip=1", suite.resources(lambda name: found))
    x, _, _, cond = inputs(config(), batch=1, size=(2, 4, 4), text=3)
    assert sample(suite.host("cfg"), policy, x, suite.schedule(4), cond).report.skipped == (1, 3)


def test_the_command_refuses_before_it_writes(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrating, "load_suite", lambda folder, **changes: suite)
    for extra, message in (
        (["--policy", "fora"], "policy 'fora' needs no calibration"),
        (["--policy", "magcache", "--clips", "0"], "needs clips of at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["calibrate", "--model", "cfg", "--out", str(tmp_path / "out"), *extra])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
