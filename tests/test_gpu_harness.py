# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu`, rehearsed on the CPU: it must work the first time a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.gpu.batch import TIERS, RivalFile
from benchmarks.gpu.ops import OPS
from benchmarks.gpu.rivals import FileRival, load_file
from disca_kernels.backend import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[1]

RIVALS = """
import os, time
import torch
import a_package_that_is_not_there.part as absent
from disca_kernels.ops.attention.cases import attention_in_dtype

def good(*x):
    return torch.func.jvp(attention_in_dtype, x[:3], x[3:])

def wrong(*x):
    o, o_dot = good(*x)
    return o, -o_dot

def crash(*x):
    os.abort()

def hang(*x):
    time.sleep(600)

def needs_more(*x):
    return absent.function(*x)

def tokens_first(q, k, v):
    o = attention_in_dtype(*(x.transpose(1, 2) for x in (q, k, v)))
    return o.transpose(1, 2)
"""


class Run(NamedTuple):
    """What one run of the command left."""

    status: int
    printed: str
    record: dict[str, Any]

    def measured(self, **wanted: str) -> list[dict[str, Any]]:
        return [m for m in self.record["measurements"] if all(m[k] == v for k, v in wanted.items())]


def command(out: Path, *arguments: str) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    [file] = out.glob("*.json")
    return Run(done.returncode, done.stdout, json.loads(file.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rivals") / "kernels.py"
    path.write_text(RIVALS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rehearsal(rivals: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dry run of everything but the build, which test_packaging.py does, with broken rivals."""
    arguments = ["--dry", "--skip", "build", "--limit", "20", "--budget", "900"]
    for name in ("crash", "wrong", "hang", "needs_more", "good"):
        arguments += ["--rival", f"{name}={rivals}:{name}"]
    arguments += ["--rival", f"tokens_first={rivals}:tokens_first:bnhd:fwd"]
    return command(tmp_path_factory.mktemp("out"), *arguments)


@pytest.mark.slow
def test_rehearsal_checks_and_times_every_operation(rehearsal: Run) -> None:
    assert rehearsal.record["kind"] == "dry"
    for op in OPS.values():
        for mode in op.modes:
            [found] = rehearsal.measured(op=op.name, mode=mode, impl="disca triton")
            assert found["status"] == "ok", found
            low, high = found["ms_middle_half"]
            assert 0 < low <= found["ms"] <= high
            assert 0 <= found["relative_error"] < 1e-2
    steps = {step["name"]: step["status"] for step in rehearsal.record["steps"]}
    assert steps.pop("build") == "skipped"
    assert set(steps.values()) == {"ok"}, rehearsal.record["steps"]
    assert rehearsal.record["ceilings"]["copy_bytes_per_second"] > 0
    assert all(t["passed"] > 0 and not t["failed"] for t in rehearsal.record["tests"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "killed by SIGABRT"),
        ("wrong", "o_dot: relative error 2.00e+00"),
        ("hang", "no result after 20 s"),
        ("needs_more", "No module named 'a_package_that_is_not_there.part'"),
    ],
)
def test_failure_costs_only_its_own_figure(rehearsal: Run, name: str, reason: str) -> None:
    [broken] = rehearsal.measured(impl=name)
    assert broken["status"] == "failed"
    assert reason in broken["reason"]
    assert "ms" not in broken
    assert rehearsal.status == 1
    listed_last = rehearsal.printed.partition("FAILED (4)")[2]
    assert f" {name}: " in listed_last


@pytest.mark.slow
def test_rivals_after_a_failure_are_measured(rehearsal: Run) -> None:
    for name, modes in (("good", ["jvp"]), ("tokens_first", ["fwd", "bwd"])):
        found = rehearsal.measured(impl=name)
        assert [(m["mode"], m["status"]) for m in found] == [(mode, "ok") for mode in modes]


def test_what_the_budget_does_not_cover_is_named(tmp_path: Path) -> None:
    run = command(tmp_path, "--dry", "--budget", "0.001")
    assert run.record["measurements"] == []
    steps = run.record["steps"]
    assert {s["status"] for s in steps} == {"skipped"}
    assert all("budget" in s["reason"] for s in steps)
    assert {s["name"] for s in steps} >= {"build", "ceilings", *(f"{op} dry" for op in OPS)}
    assert "step build: skipped, the budget of 0 s was used up before it" in run.printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    run = command(tmp_path, "--skip", "build")
    assert run.status == 1
    assert run.record["measurements"] == []
    assert "gpu: torch sees no CUDA device here" in run.printed


def test_every_operation_is_measured() -> None:
    assert sorted([*IMPLEMENTATIONS, "predictor_step"]) == sorted(OPS)
    tiers = {
        name: tuple(t for t in op.cases if t not in ("quick", "dry")) for name, op in OPS.items()
    }
    assert tiers == TIERS
    assert all({"quick", "dry"} <= set(op.cases) for op in OPS.values())


@pytest.mark.parametrize(
    "text",
    [
        "kernel.py:function",
        "x=kernel.py",
        "x=/nowhere.py:f",
        "x={file}:f:hbnd",
        "x={file}:f:bhnd:bwd",
        "x={file}:f:bhnd:fwd:more",
    ],
)
def test_unusable_rival_is_refused(rivals: Path, text: str) -> None:
    with pytest.raises(ValueError, match="a rival is name=/path"):
        RivalFile.parse(text.format(file=rivals))


def test_placeholder_leaves_real_modules_alone(tmp_path: Path) -> None:
    file = tmp_path / "imports.py"
    file.write_text("import os.path\nimport torch.not_there as n\nprobe = n.x\n", encoding="utf-8")
    module = load_file(file)
    assert module.os is os
    with pytest.raises(ModuleNotFoundError, match=r"torch\.not_there"):
        module.probe()


TUNED = """
class Autotuner:
    configs = ["small", "large", "huge"]
    best_config = None
    calls = []

    def __call__(self, n):
        self.calls.append((n, tuple(self.configs)))
        self.best_config = self.configs[1] if len(self.configs) > 1 else self.configs[0]

tuner = Autotuner()

def kernel(q, k, v):
    tuner(q.shape[2])
    return q + 0 * k + 0 * v
"""


def test_tuning_happens_once_and_at_a_short_length(tmp_path: Path) -> None:
    file = tmp_path / "tuned.py"
    file.write_text(TUNED, encoding="utf-8")
    rival = FileRival(RivalFile("tuned", file, "kernel", mode="fwd"), tmp_path / "choices.json")
    prepare = rival.implementation().prepare
    attention = OPS["attention"]
    [case] = attention.cases["quick"]
    for n in (4096, 8192):
        longer = type(case)(1, 1, n, n, 8)
        operands = attention.draw(longer, torch.device("cpu"), 0)
        prepare(longer, "fwd", operands)()
    every = ("small", "large", "huge")
    assert load_file(file).tuner.calls == [(4096, every), (4096, ("large",)), (8192, ("large",))]
