# SPDX-License-Identifier: Apache-2.0
"""Sample rows and score what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disca.compare.flops import FlopCounter
from disca.compare.results import SeedScores
from disca.errors import UserError
from disca.eval.distances import sliced_wasserstein
from disca.eval.scores import (
    frechet_distance,
    jitter,
    psnr,
    relative_errors,
    semantic_score,
    ssim,
)
from disca.sample import cached_sample

if TYPE_CHECKING:
    from disca.cache import CacheReport, Policy
    from disca.compare.plan import Plan, RowPlan
    from disca.compare.suite import Suite
    from disca.data.source import ClipBatch
    from disca.models.condition import Condition

__all__ = ["Inputs", "Judge", "Sampled", "error_scores", "sample_row", "seed_inputs"]

# Distinguishes the random streams of one seed: prompts with real clips, noise, reference clips.
_PROMPTS, _NOISE, _REFERENCE, _STREAMS = 0, 1, 2, 3

# SSIM's window is 11 pixels wide.
_SSIM_SIDE = 11


@dataclass(frozen=True)
class Inputs:
    """What every row of a seed starts from.

    Attributes:
        real: held-out clips whose prompts are followed.
        noise: starting points [B, C, F, H, W].
    """

    real: ClipBatch
    noise: Tensor


@dataclass
class Sampled:
    """The clips of one row and seed.

    Attributes:
        x: the samples [B, C, F, H, W].
        report: the policy's report of the first batch.
        cache_bytes: the cache of one clip.
        flops: operations of one clip.
        trajectory: the samples after each step, if they were asked for.
    """

    x: Tensor
    report: CacheReport
    cache_bytes: int
    flops: float
    trajectory: list[Tensor] = field(default_factory=list)


def generator(seed: int, stream: int) -> torch.Generator:
    """Return the generator of one of a seed's random streams."""
    return torch.Generator().manual_seed(seed * _STREAMS + stream)


def seed_inputs(suite: Suite, clips: int, seed: int) -> Inputs:
    """Draw a seed's held-out clips, whose prompts are followed, and its noise."""
    real = suite.source.sample(clips, generator(seed, _PROMPTS), split="test")
    return Inputs(real, torch.randn(real.clips.shape, generator=generator(seed, _NOISE)))


def sample_row(
    suite: Suite,
    row: RowPlan,
    policy: Policy,
    noise: Tensor,
    cond: Condition,
    *,
    batch: int,
    trajectory: bool,
) -> Sampled:
    """Sample one row and count its operations.

    Args:
        suite: the models.
        row: model and steps.
        policy: the row's policy.
        noise: starting points [B, C, F, H, W].
        cond: prompts without guidance, batch B.
        batch: clips that are sampled at once.
        trajectory: keep the samples after each step.
    """
    schedule = suite.schedule(row.steps)
    cond = suite.condition(row.model, cond)
    counter = FlopCounter()
    results = []
    for start in range(0, len(noise), batch):
        part = slice(start, start + batch)
        with counter:
            results.append(
                cached_sample(
                    suite.host(row.model),
                    policy,
                    # A copy: a policy that keeps its input would else keep all of the noise.
                    noise[part].clone(),
                    schedule,
                    cond.select(part),
                    trajectory=trajectory,
                )
            )
    first = min(batch, len(noise))
    return Sampled(
        torch.cat([result.x for result in results]),
        results[0].report,
        results[0].cache_bytes // first,
        counter.total / len(noise),
        [torch.cat(step) for step in zip(*(r.trajectory for r in results), strict=True)],
    )


class Judge:
    """Scores clips against what was asked for and against real held-out clips.

    Args:
        suite: source and classifier.
        plan: number of reference clips.

    Raises:
        UserError: the clips have labels and there is no classifier to read them.
    """

    def __init__(self, suite: Suite, plan: Plan) -> None:
        reference = suite.source.sample(
            plan.reference_clips, generator(0, _REFERENCE), split="test"
        )
        self.source = suite.source
        self.classifier = suite.classifier
        self.reference = reference.clips
        if reference.labels is None:
            self.classifier = None
        elif self.classifier is None:
            raise UserError(
                "the checkpoints have no finished classifier stage, which the scores of labelled "
                "clips need; train it with disca train --stage classifier"
            )
        else:
            self.features = self.classifier.embed(reference.clips)

    def score(self, seed: int, clips: Tensor, labels: Tensor | None) -> SeedScores:
        """Score generated clips [B, C, F, H, W], clamped as when they are shown or saved."""
        clips = clips.clamp(-1, 1)
        if self.classifier is None or labels is None:
            return SeedScores(seed=seed, wasserstein=sliced_wasserstein(clips, self.reference).mean)
        score = semantic_score(self.classifier, clips, labels)
        return SeedScores(
            seed=seed,
            semantic=score.mean,
            digit=score.digit,
            direction=score.direction,
            speed=score.speed,
            joint=score.joint,
            frechet=frechet_distance(self.classifier.embed(clips), self.features),
        )

    def real(self, seed: int, real: ClipBatch) -> SeedScores:
        """Score real clips: held-out ones for semantics, training ones for the distance.

        That is the level to read everything against: the classifier's own ceiling, and how far
        apart the two splits are.
        """
        drawn = self.source.sample(len(real), generator(seed, _NOISE), split="train")
        distance = self.score(seed, drawn.clips, drawn.labels)
        if real.labels is None:
            return distance
        semantic = self.score(seed, real.clips, real.labels)
        return semantic.model_copy(update={"frechet": distance.frechet})


def error_scores(
    x: Tensor, uncached: Tensor | None, target: Tensor | None
) -> dict[str, float | None]:
    """Return the scores of samples against those of other runs from the same noise.

    Args:
        x: samples [B, C, F, H, W].
        uncached: samples of the same model and steps without a cache; None if this is that run.
        target: samples of the plan's target; None if this is that row.
    """
    scores: dict[str, float | None] = {}
    if uncached is not None:
        each = relative_errors(x, uncached)
        ratio = psnr(x, uncached)
        scores |= {
            "error_uncached": each.mean().item(),
            "error_uncached_median": each.median().item(),
            "psnr_uncached": ratio if math.isfinite(ratio) else None,
        }
        if x.shape[2] > 1:
            scores["jitter_uncached"] = jitter(x, uncached)
        if min(x.shape[-2:]) >= _SSIM_SIDE:
            scores["ssim_uncached"] = ssim(x, uncached)
    if target is not None:
        each = relative_errors(x, target)
        scores["error_teacher"] = each.mean().item()
        scores["error_teacher_median"] = each.median().item()
    return scores
