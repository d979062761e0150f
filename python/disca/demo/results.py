# SPDX-License-Identifier: Apache-2.0
"""The content of results.json: what was run, where, and what came out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["METRICS", "Results", "Row", "SeedScores", "Spread", "Timing", "summarise"]

SCHEMA_VERSION: Literal[1] = 1

METRICS = (
    "semantic",
    "digit",
    "direction",
    "speed",
    "joint",
    "frechet",
    "error_uncached",
    "error_uncached_median",
    "jitter_uncached",
    "error_teacher",
)
"""The scores of one seed, in the order of the table."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """Mean and sample standard deviation over seeds; the latter is None for a single seed."""

    mean: float
    std: float | None


class Timing(_Record):
    """Median, lowest and highest of repeated measurements."""

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Timing:
        """Summarise measurements."""
        kept = list(values)
        return cls(median=statistics.median(kept), low=min(kept), high=max(kept), values=kept)


class SeedScores(_Record):
    """Scores of one method at one seed.

    Attributes:
        seed: seed of prompts and noise.
        semantic: mean of the next three.
        digit: share of clips whose digit the classifier reads as the prompt says.
        direction: the same for the direction.
        speed: the same for the speed.
        joint: share of clips with all three right.
        frechet: Fréchet distance to real held-out clips in the classifier's features.
        error_uncached: relative squared error to the same seed without the cache, mean of clips.
        error_uncached_median: the same, of the median clip.
        jitter_uncached: the same error of the differences from frame to frame.
        error_teacher: relative squared error to the same seed of the 50x2-pass teacher.
    """

    seed: int
    semantic: float
    digit: float
    direction: float
    speed: float
    joint: float
    frechet: float
    error_uncached: float | None = None
    error_uncached_median: float | None = None
    jitter_uncached: float | None = None
    error_teacher: float | None = None


class Row(_Record):
    """One method.

    Attributes:
        key: name of the method.
        label: its name in tables.
        model: the stage whose weights were sampled; "real" for real clips.
        steps: number of steps.
        full_steps: the steps that ran the whole network; None when all did.
        full_passes: passes through the whole network.
        predictor_passes: passes through the predictor, or replays of the cache.
        cache_bytes: the cache of one clip.
        flops: operations of one clip's denoising loop.
        theoretical_speedup: the reference's operations over these.
        seconds: measured time of one batch's denoising loop.
        measured_speedup: the reference's time over this one's, both of the same repeat.
        per_seed: the scores.
        summary: mean and spread of each score.
    """

    key: str
    label: str
    model: str
    steps: int = 0
    full_steps: list[int] | None = None
    full_passes: int = 0
    predictor_passes: int = 0
    cache_bytes: int = 0
    flops: int | None = None
    theoretical_speedup: float | None = None
    seconds: Timing | None = None
    measured_speedup: Timing | None = None
    per_seed: list[SeedScores]
    summary: dict[str, Spread]


class Results(_Record):
    """Everything that a run of the demo or of the evaluation measured.

    Attributes:
        schema_version: changes when a field changes its meaning.
        created: time of the run, ISO 8601, UTC.
        versions: of Python and packages.
        machine: processor, cores, threads, memory, devices (:func:`disca_kernels.env.collect`).
        settings: seeds, numbers of clips, guidance, shift, timing.
        models: parameters, operations and time of host and predictor.
        rows: the methods; the first is the reference of the speed-ups, the last real clips.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    versions: dict[str, str | None]
    machine: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, Any]
    rows: list[Row]

    def row(self, key: str) -> Row:
        """Return the row of a method."""
        return next(row for row in self.rows if row.key == key)


def summarise(scores: Iterable[SeedScores]) -> dict[str, Spread]:
    """Return mean and spread over seeds of every score that all seeds have."""
    kept = list(scores)
    summary = {}
    for name in METRICS:
        values = [getattr(score, name) for score in kept]
        if None not in values:
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = Spread(mean=statistics.fmean(values), std=std)
    return summary
