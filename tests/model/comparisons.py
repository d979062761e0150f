# SPDX-License-Identifier: Apache-2.0
"""A small finished comparison that was never run, for the tests of what is made of one."""

import torch

from disca.compare.clips import save_clips
from disca.compare.results import Results, Row, SeedScores, Timing, summarise

PROMPTS = ["7 left fast", "3 up slow"]
FRAMES, SIZE = 4, 8


def make_row(key, **changes):
    """A row of 10 steps; scores of two seeds 0.1 apart around what `scores` says."""
    scores = changes.pop("scores", {"semantic": 0.9, "frechet": 12.0})
    speed = changes.pop("speed", 1.0)
    per_seed = [
        SeedScores(seed=seed, **{name: value + sign * 0.05 for name, value in scores.items()})
        for seed, sign in ((0, -1), (1, 1))
    ]
    values = {
        "key": key,
        "label": key,
        "group": "",
        "policy": "none",
        "spec": "none",
        "model": "cfg",
        "steps": 10,
        "hooked": [],
        "computed": list(range(10)),
        "skipped": [],
        "cache_bytes": 0,
        "peak_bytes": 4096,
        "flops": 1e9 / speed,
        "full_passes": 10.0 / speed,
        "theoretical_speedup": speed,
        "seconds": Timing.of([1.0 / speed] * 3),
        "speedup": Timing.of([0.9 * speed, speed, 1.1 * speed]),
        "seconds_total": Timing.of([1.1 / speed] * 3),
        "speedup_total": Timing.of([0.95 * speed] * 3),
        "error_per_step": None,
        "per_seed": per_seed,
        "summary": summarise(per_seed),
    }
    return Row(**(values | changes))


def cached_row(key, **changes):
    """A row that computes steps 0, 3, 6 and 9 and holds 2 KiB a clip."""
    defaults = {
        "policy": "fora",
        "spec": "fora:interval=3",
        "hooked": ["block 0 attention", "block 0 mlp"],
        "computed": [0, 3, 6, 9],
        "skipped": [1, 2, 4, 5, 7, 8],
        "cache_bytes": 2048,
        "error_per_step": [0.0, *(0.001 * 2**i for i in range(9))],
        "speed": 2.5,
        "scores": {"semantic": 0.8, "frechet": 20.0, "error_uncached_median": 0.2},
    }
    return make_row(key, **(defaults | changes))


def make_results(rows=None, **changes):
    """Results of two groups: an uncached and a cached row each."""
    if rows is None:
        rows = [
            make_row("cfg-10", label="CFG, 10 steps", group="Student"),
            cached_row("cfg-10-fora", label="FORA, 3", group="Student"),
            make_row("flow-4", label="Flow, 4 steps", group="Distilled", model="flow", steps=4,
                     computed=[0, 1, 2, 3], speed=2.5),
            cached_row("flow-4-reuse", label="Reuse, 2", group="Distilled", model="flow", steps=4,
                       policy="reuse", spec="reuse:full_steps=every:2", computed=[0, 2],
                       skipped=[1, 3], error_per_step=[0.0, 0.1, 0.05, 0.2], speed=4.9),
        ]  # fmt: skip
    host = {"parameters": 1000, "flops": 5e6}
    values = {
        "title": "Two students",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "disca compare --preset two --out two",
        "versions": {"torch": "2.10", "flash-attn": None},
        "machine": {"processor": "a processor", "torch_threads": 2},
        "settings": {
            "seeds": [0, 1],
            "clips": 16,
            "batch": 8,
            "repeats": 3,
            "timing_batch": 4,
            "guidance": 4.0,
            "shift": 5.0,
            "target": "the first row",
            "prompts": PROMPTS,
        },
        "models": {"hosts": {"cfg": host, "flow": host}, "predictors": {}},
        "rows": rows,
        "real": summarise([SeedScores(seed=0, semantic=0.97, frechet=5.0)]),
    }
    return Results(**(values | changes))


def make_clips(results, channels=1):
    """Clips [2, C, F, H, W] of every row and real ones: a bright column that moves to the right."""
    clips = {}
    for i, key in enumerate([*(row.key for row in results.rows), "real"]):
        clip = torch.full((len(PROMPTS), channels, FRAMES, SIZE, SIZE), -1.0)
        for frame in range(FRAMES):
            clip[:, :, frame, :, (i + 2 * frame) % SIZE] = 1.0
        clips[key] = clip
    return clips


def write_comparison(folder, results=None, clips=None):
    """Write a finished comparison as `disca compare` leaves it."""
    results = make_results() if results is None else results
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.model_dump_json(), encoding="utf-8")
    save_clips(folder, make_clips(results) if clips is None else clips)
    return results
