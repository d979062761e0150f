# SPDX-License-Identifier: Apache-2.0
"""The content of results.json: what was run, where, and what came out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from disca.errors import UserError

__all__ = [
    "METRICS",
    "RESULTS_FILE",
    "Results",
    "Row",
    "SeedScores",
    "Spread",
    "Timing",
    "load_results",
    "summarise",
]

SCHEMA_VERSION: Literal[2] = 2
RESULTS_FILE = "results.json"

METRICS = (
    "semantic",
    "digit",
    "direction",
    "speed",
    "joint",
    "frechet",
    "wasserstein",
    "error_uncached",
    "error_uncached_median",
    "jitter_uncached",
    "psnr_uncached",
    "ssim_uncached",
    "error_teacher",
    "error_teacher_median",
)
"""The scores of one seed, in the order of the tables."""


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
    """Scores of one method at one seed; None where the data or the method has no such score.

    Attributes:
        seed: seed of prompts and noise.
        semantic: mean of the next three.
        digit: share of clips whose digit the classifier reads as the prompt says.
        direction: the same for the direction.
        speed: the same for the speed.
        joint: share of clips with all three right.
        frechet: Fréchet distance to real held-out clips in the classifier's features.
        wasserstein: sliced Wasserstein distance to real held-out clips, for data without labels.
        error_uncached: relative squared error of the latents to the same seed without the cache,
            mean of clips.
        error_uncached_median: the same, of the median clip.
        jitter_uncached: the same error of the differences from frame to frame.
        psnr_uncached: peak signal-to-noise ratio to that run in dB; None if all clips are equal.
        ssim_uncached: structural similarity to that run.
        error_teacher: relative squared error to the same seed of the plan's target.
        error_teacher_median: the same, of the median clip.
    """

    seed: int
    semantic: float | None = None
    digit: float | None = None
    direction: float | None = None
    speed: float | None = None
    joint: float | None = None
    frechet: float | None = None
    wasserstein: float | None = None
    error_uncached: float | None = None
    error_uncached_median: float | None = None
    jitter_uncached: float | None = None
    psnr_uncached: float | None = None
    ssim_uncached: float | None = None
    error_teacher: float | None = None
    error_teacher_median: float | None = None


class Row(_Record):
    """One method.

    Attributes:
        key: name of the method; rows of two groups with one key are the same measurement.
        label: its name in tables.
        group: the part of the plan that it belongs to.
        policy: name of the cache policy.
        spec: the policy with its settings, as ``disca compare --policy`` takes it.
        model: the stage whose weights were sampled.
        steps: number of steps.
        hooked: the parts of the host that the policy reads or replaces.
        computed: the steps that ran the whole network, in the first batch of the first seed.
        skipped: the steps that did not.
        cache_bytes: the most that the cache held between two steps, of one clip.
        peak_bytes: the most that tensors took during the loop beyond weights and input, of one
            clip.
        flops: operations of one clip's denoising loop, mean over all clips of all seeds.
        full_passes: these operations over those of one pass of this model.
        theoretical_speedup: the reference row's operations over these.
        seconds: measured time of one batch's denoising loop.
        speedup: the reference's time over this one's, both of the same repeat.
        seconds_total: measured time end to end: prompts encoded, noise drawn, loop, clips to bytes.
        speedup_total: the reference's over this one's.
        error_per_step: relative squared error of the sample after each step to the uncached run's,
            median of the first seed's clips; None for a run without a cache.
        per_seed: the scores.
        summary: mean and spread of each score.
    """

    key: str
    label: str
    group: str
    policy: str
    spec: str
    model: str
    steps: int
    hooked: list[str]
    computed: list[int]
    skipped: list[int]
    cache_bytes: int
    peak_bytes: int
    flops: float
    full_passes: float
    theoretical_speedup: float
    seconds: Timing
    speedup: Timing
    seconds_total: Timing
    speedup_total: Timing
    error_per_step: list[float] | None
    per_seed: list[SeedScores]
    summary: dict[str, Spread]


class Results(_Record):
    """Everything that a comparison measured.

    Attributes:
        schema_version: changes when a field changes its meaning.
        title: what was compared.
        created: time of the run, ISO 8601, UTC.
        command: the command line that made it.
        versions: of Python and packages.
        machine: processor, cores, threads, memory, devices (:func:`disca_kernels.env.collect`).
        settings: seeds, numbers of clips, guidance, shift, timing, prompts of the kept clips.
        models: parameters, operations and time of each network.
        rows: the methods; the first is the reference of the speed-ups.
        real: scores of other real held-out clips.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    title: str
    created: str
    command: str
    versions: dict[str, str | None]
    machine: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, Any]
    rows: list[Row]
    real: dict[str, Spread]

    def row(self, key: str) -> Row:
        """Return the row of a method."""
        return next(row for row in self.rows if row.key == key)

    def groups(self) -> dict[str, list[Row]]:
        """Return the rows by group, in order."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups


class _Read(BaseModel):
    """Part of what the notes and the report read of an open field; the rest of it is free."""

    model_config = ConfigDict(strict=True)


class _Host(_Read):
    parameters: int
    flops: float


class _Predictor(_Read):
    host: str
    parameters: int
    parameter_share: float
    time_share: float
    flop_share: float


class _Paths(_Read):
    stage: str
    steps: int
    detour: float
    turning: float
    straightness: float


class _Models(_Read):
    hosts: dict[str, _Host]
    predictors: dict[str, _Predictor]
    paths: _Paths | None = None


class _Machine(_Read):
    processor: str
    torch_threads: int


class _Settings(_Read):
    seeds: list[int]
    clips: int
    batch: int
    repeats: int
    timing_batch: int
    guidance: float
    shift: float
    target: str
    prompts: list[str] | None = None


class _OpenFields(_Read):
    machine: _Machine
    settings: _Settings
    models: _Models


def load_results(folder: Path) -> Results:
    """Read the results of a comparison.

    Args:
        folder: the folder that ``disca compare --out`` wrote.

    Raises:
        UserError: no results in it, another schema, a damaged file, or one whose settings, models
            or machine lack a field that the notes and the report read.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {RESULTS_FILE}: no comparison finished there; run "
            f"'disca compare --out {folder}', which goes on where it was stopped"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {found!r}, this version reads {SCHEMA_VERSION}; run "
            "'disca compare' again to make it anew"
        )
    try:
        results = Results.model_validate(content)
        _OpenFields.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is damaged at {where}: {first['msg']}; run 'disca compare' again to make it "
            "anew"
        ) from error
    return results


def summarise(scores: Iterable[SeedScores]) -> dict[str, Spread]:
    """Return mean and spread over seeds of every score that all seeds have."""
    kept = list(scores)
    summary = {}
    for name in METRICS:
        values = [getattr(score, name) for score in kept]
        if values and None not in values:
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = Spread(mean=statistics.fmean(values), std=std)
    return summary
