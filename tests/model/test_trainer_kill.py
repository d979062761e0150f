# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment, then the same command again: the same weights, the same log lines."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = ("classifier", "teacher", "rmeanflow", "predictor")

# One process imports everything once and forks a child for each run, as a shell starts commands.
DRIVER = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
import torch._dynamo  # which optimisers import when they are first used
torch.set_num_threads(1)
from disca.data.source import build_source
from disca.distill import checkpoint
from disca.distill.config import load_config
from disca.distill.run import train

STEPS, STAGES = 5, sys.argv[2].split(",")
small = {"steps": STEPS, "batch": 4, "checkpoint_every": 3, "tensorboard": False}
changes = {
    "threads": 1,
    "data": {"frames": 4, "size": 8, "starts": "free"},
    "model": {"patch": [2, 4, 4], "hidden": 16, "heads": 2, "double_blocks": 1,
              "single_blocks": 1, "rope_dims": [4, 2, 2], "time_features": 8},
    "stages": {name: dict(small) for name in STAGES},
}
changes["stages"]["classifier"] = {"steps": 3, "batch": 4}
changes["stages"]["rmeanflow"] |= {"teacher": "teacher", "guidance": None}
changes["stages"]["predictor"] |= {"mse_steps": 2, "guidance": None}
config = load_config("digits", changes=changes)
build_source(config.data).sample(1, torch.Generator())


def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def nth(function, n, *, after):
    calls = 0
    def wrapped(*args, **options):
        nonlocal calls
        calls += 1
        if calls == n and not after:
            die()
        result = function(*args, **options)
        if calls == n:
            die()
        return result
    return wrapped


def half_written(function, n):
    calls = 0
    def wrapped(tensors, path, metadata):
        nonlocal calls
        calls += 1
        function(tensors, path, metadata)
        if calls == n:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    return wrapped


def start(out, fault):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if fault == "before rename":
                os.replace = nth(os.replace, 3, after=False)
            if fault == "after rename":
                os.replace = nth(os.replace, 3, after=True)
            if fault == "half a file":
                checkpoint.save_file = half_written(checkpoint.save_file, 2)
            train(config, out, stages=STAGES, progress=False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def finish(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def processor_seconds(child):
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_after(child, seconds):
    '''SIGKILL a child once it has used that much processor time; tell whether it came to that.'''
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if processor_seconds(child) >= seconds:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return finish(child) == -signal.SIGKILL


root = Path(sys.argv[1])
child = start(root / "undisturbed", "")
_, status, usage = os.wait4(child, 0)
assert status == 0
took = usage.ru_utime + usage.ru_stime
for fault in ("before rename", "after rename", "half a file"):
    kills = 0
    while (code := finish(start(root / fault, fault))) != 0:
        assert code == -signal.SIGKILL, code
        kills += 1
        assert kills < 60
    assert kills >= 3, (fault, kills)
rng = random.Random(0)
for trial in ("random 0", "random 1"):
    moments = [rng.uniform(0.05, 0.6) * took for _ in range(4)]
    kills = sum(kill_after(start(root / trial, ""), moment) for moment in moments)
    assert kills >= 1, (trial, kills)
    assert finish(start(root / trial, "")) == 0
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root), ",".join(STAGES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def log_lines(path: Path) -> list[dict]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read]


@pytest.mark.parametrize(
    "name", ["before rename", "after rename", "half a file", "random 0", "random 1"]
)
def test_killed_run_equals_the_undisturbed_one(runs: Path, name: str) -> None:
    for stage in STAGES:
        expected, actual = runs / "undisturbed" / stage, runs / name / stage
        digests = [
            hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            for folder in (expected, actual)
        ]
        assert digests[0] == digests[1], stage
        if stage != "classifier":
            assert log_lines(actual / "log.jsonl") == log_lines(expected / "log.jsonl")
            assert len(log_lines(actual / "log.jsonl")) == 5


@pytest.mark.parametrize("name", ["undisturbed", "before rename", "half a file"])
def test_nothing_is_left_behind(runs: Path, name: str) -> None:
    found = {p.relative_to(runs / name).as_posix() for p in (runs / name).rglob("*") if p.is_file()}
    expected = {"config.yaml", ".lock"}
    for stage in STAGES:
        expected |= {f"{stage}/model.safetensors", f"{stage}/done.json"}
        if stage != "classifier":
            expected.add(f"{stage}/log.jsonl")
    assert found == expected
