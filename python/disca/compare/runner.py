# SPDX-License-Identifier: Apache-2.0
"""Sample every method on the same prompts and noise, score it and time it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from disca.compare.costs import describe_models, method_flops, path_curvature
from disca.compare.methods import Method, default_methods, run_method
from disca.compare.results import Results, Row, SeedScores, Timing, summarise
from disca.compare.timing import measure_methods
from disca.errors import UserError
from disca.eval.scores import (
    frechet_distance,
    jitter,
    relative_error,
    relative_errors,
    semantic_score,
)
from disca.sample import resolve_full_steps
from disca_kernels.env import collect

if TYPE_CHECKING:
    from disca.compare.suite import Suite
    from disca.data.source import ClipBatch
    from disca.eval.classifier import ClipClassifier
    from disca.sample import SampleResult

__all__ = ["Evaluation", "EvaluationSettings", "evaluate"]

# Distinguishes the random streams of one seed: prompts with real clips, noise, reference clips.
_PROMPTS, _NOISE, _REFERENCE = 0, 1, 2

# Steps of the paths whose curvature is reported.
_PATH_STEPS = 50


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is sampled and how often it is timed.

    Attributes:
        seeds: each draws its own prompts, real clips and noise.
        clips: clips of each method and seed.
        batch: clips that are sampled at once.
        reference_clips: real held-out clips that the Fréchet distance is taken to.
        timing_batch: clips that are sampled at once where time is measured.
        repeats: timed runs of each method.
        shown: clips of each method that are kept for the picture.
    """

    seeds: tuple[int, ...] = (0,)
    clips: int = 128
    batch: int = 64
    reference_clips: int = 512
    timing_batch: int = 8
    repeats: int = 5
    shown: int = 6

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: no seed, a seed twice or negative, or a number below 1.
        """
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds must be different numbers from 0 up, got {list(self.seeds)}")
        for name, value in asdict(self).items():
            if name != "seeds" and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if min(self.clips, self.reference_clips) < 2:
            raise UserError("clips and reference_clips must be at least 2: one clip has no spread")


@dataclass
class Evaluation:
    """What an evaluation gives.

    Attributes:
        results: the content of results.json.
        prompts: the prompts of the kept clips, of the first seed.
        clips: label of the method to its first clips [n, C, F, H, W], real ones last.
    """

    results: Results
    prompts: list[str]
    clips: dict[str, Tensor]


@dataclass
class _Measured:
    """What the seeds have brought in so far, by method."""

    scores: dict[str, list[SeedScores]] = field(default_factory=dict)
    counts: dict[str, SampleResult] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    def add(self, key: str, scores: SeedScores) -> None:
        self.scores.setdefault(key, []).append(scores)


def evaluate(
    suite: Suite,
    settings: EvaluationSettings,
    *,
    methods: Sequence[Method] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Sample, score and time the methods.

    Every method of a seed starts from the same noise and follows the same prompts. Scores are
    taken with the suite's classifier: the share of clips whose digit, direction and speed it reads
    as the prompt says, and the Fréchet distance of its features to those of real held-out clips.
    The last row holds other real held-out clips, judged the same way.

    Args:
        suite: models and sampling settings.
        settings: how much.
        methods: what to compare; :func:`disca.compare.methods.default_methods` by default. The first
            is the reference of the speed-ups.
        progress: whether to draw a progress bar.

    Returns:
        The results with some clips of the first seed.

    Raises:
        UserError: a stage, a predictor or the classifier is missing, or a list of full steps does
            not fit.
    """
    if suite.classifier is None:
        raise UserError("the checkpoints have no finished classifier stage, which the scores need")
    rows = list(methods or default_methods(tuple(suite.predictors), suite.sampling.form))
    models = _describe(suite, settings)
    flops = {method.key: method_flops(suite, method) for method in rows}
    work = sum(flops.values())
    total = work * (len(settings.seeds) * settings.clips + settings.repeats * settings.timing_batch)
    with tqdm(
        total=total, desc="sampling", disable=not progress, bar_format=_BAR, mininterval=0.5
    ) as bar:

        def advance(key: str, clips: int) -> None:
            bar.update(flops[key] * clips)

        measured = _score_seeds(suite, suite.classifier, rows, settings, advance)
        bar.set_description_str("timing")
        seconds = _time_rows(suite, rows, settings, advance)
    environment = collect()
    base = (flops[rows[0].key], seconds[rows[0].key])
    at_once = min(settings.batch, settings.clips)
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=environment["versions"],
        machine=environment["machine"],
        settings={**asdict(settings), "seeds": list(settings.seeds), **suite.sampling.model_dump()},
        models=models,
        rows=[
            *(
                _row(method, measured, seconds[method.key], flops[method.key], base, at_once)
                for method in rows
            ),
            _real_row(measured),
        ],
    )
    return Evaluation(results, measured.prompts, measured.clips)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"


def _score_seeds(
    suite: Suite,
    classifier: ClipClassifier,
    methods: Sequence[Method],
    settings: EvaluationSettings,
    advance: Callable[[str, int], None],
) -> _Measured:
    measured = _Measured()
    reference = suite.source.sample(
        settings.reference_clips, _generator(0, _REFERENCE), split="test"
    )
    target = classifier.embed(reference.clips)
    for seed in settings.seeds:
        real, noise = _inputs(suite, settings.clips, seed)
        if real.labels is None:
            raise UserError("the scores need labelled clips, such as the moving digits")
        samples: dict[str, Tensor] = {}
        for method in methods:
            samples[method.key] = _sample(suite, method, noise, real, settings, advance, measured)
        for method in methods:
            scores = _scores(seed, classifier, samples[method.key], real.labels, target)
            errors = _errors(method, samples, methods[0].key)
            measured.add(method.key, scores.model_copy(update=errors))
        measured.add("real", _scores(seed, classifier, real.clips, real.labels, target))
        _keep(measured, methods, samples, real, suite, settings.shown)
    return measured


def _sample(
    suite: Suite,
    method: Method,
    noise: Tensor,
    real: ClipBatch,
    settings: EvaluationSettings,
    advance: Callable[[str, int], None],
    measured: _Measured,
) -> Tensor:
    result = run_method(
        suite,
        method,
        noise,
        real.condition,
        batch=settings.batch,
        advance=partial(advance, method.key),
    )
    measured.counts[method.key] = result
    return result.x


def _keep(
    measured: _Measured,
    methods: Sequence[Method],
    samples: Mapping[str, Tensor],
    real: ClipBatch,
    suite: Suite,
    shown: int,
) -> None:
    """Keep the first seed's first clips."""
    if measured.clips:
        return
    measured.prompts = suite.prompts_of(real)[:shown]
    measured.clips = {method.label: samples[method.key][:shown] for method in methods}
    measured.clips[REAL_LABEL] = real.clips[:shown]


REAL_LABEL = "Real held-out clips"


def _scores(
    seed: int, classifier: ClipClassifier, clips: Tensor, labels: Tensor, target: Tensor
) -> SeedScores:
    clips = clips.clamp(-1, 1)  # as when a clip is shown or saved
    score = semantic_score(classifier, clips, labels)
    return SeedScores(
        seed=seed,
        semantic=score.mean,
        digit=score.digit,
        direction=score.direction,
        speed=score.speed,
        joint=score.joint,
        frechet=frechet_distance(classifier.embed(clips), target),
    )


def _errors(
    method: Method, samples: Mapping[str, Tensor], reference: str
) -> dict[str, float | None]:
    x = samples[method.key]
    errors: dict[str, float | None] = {}
    if method.uncached is not None:
        each = relative_errors(x, samples[method.uncached])
        errors["error_uncached"] = each.mean().item()
        errors["error_uncached_median"] = each.median().item()
        errors["jitter_uncached"] = jitter(x, samples[method.uncached])
    if method.key != reference:
        errors["error_teacher"] = relative_error(x, samples[reference])
    return errors


def _time_rows(
    suite: Suite,
    methods: Sequence[Method],
    settings: EvaluationSettings,
    advance: Callable[[str, int], None],
) -> dict[str, list[float]]:
    batch, noise = _inputs(suite, settings.timing_batch, 0)
    return measure_methods(
        suite,
        list(methods),
        noise,
        batch.condition,
        settings.repeats,
        advance=lambda key: advance(key, settings.timing_batch),
    )


def _inputs(suite: Suite, clips: int, seed: int) -> tuple[ClipBatch, Tensor]:
    """Draw a seed's real clips with their prompts, and its noise."""
    real = suite.source.sample(clips, _generator(seed, _PROMPTS), split="test")
    return real, torch.randn(real.clips.shape, generator=_generator(seed, _NOISE))


def _describe(suite: Suite, settings: EvaluationSettings) -> dict[str, Any]:
    batch, noise = _inputs(suite, settings.timing_batch, 0)
    described = describe_models(suite, noise, batch.condition, max(10, settings.repeats))
    paths = path_curvature(suite, "cfg", _PATH_STEPS, noise, batch.condition)
    return {**described, "paths": {"stage": "cfg", "steps": _PATH_STEPS, **paths}}


def _row(
    method: Method,
    measured: _Measured,
    seconds: Sequence[float],
    flops: int,
    reference: tuple[int, Sequence[float]],
    at_once: int,
) -> Row:
    """Put a method's row together; ``reference`` has the first row's operations and seconds."""
    counts = measured.counts[method.key]
    full = method.full_steps
    return Row(
        key=method.key,
        label=method.label,
        model=method.model,
        steps=method.steps,
        full_steps=None if full is None else list(resolve_full_steps(full, method.steps)),
        full_passes=counts.full_passes,
        predictor_passes=counts.predictor_passes,
        cache_bytes=counts.cache_bytes // at_once,
        flops=flops,
        theoretical_speedup=reference[0] / flops,
        seconds=Timing.of(seconds),
        measured_speedup=Timing.of(a / b for a, b in zip(reference[1], seconds, strict=True)),
        per_seed=measured.scores[method.key],
        summary=summarise(measured.scores[method.key]),
    )


def _real_row(measured: _Measured) -> Row:
    scores = measured.scores["real"]
    return Row(
        key="real", label=REAL_LABEL, model="real", per_seed=scores, summary=summarise(scores)
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 3 + stream)
