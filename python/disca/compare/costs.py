# SPDX-License-Identifier: Apache-2.0
"""What the models are: operations, parameters, time of a step, shape of the sampling paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from disca.cache import NoCache
from disca.compare.flops import count_flops
from disca.compare.results import Timing
from disca.compare.timing import measure_step
from disca.eval.scores import curvature
from disca.models import PredictorStep
from disca.sample import cached_sample

if TYPE_CHECKING:
    from disca.compare.suite import Suite
    from disca.models.condition import Condition

__all__ = ["describe_host", "describe_predictor", "pass_flops", "path_curvature", "predicted_flops"]


def _one_clip(suite: Suite, stage: str) -> tuple[Tensor, Tensor, Condition]:
    noise = torch.zeros(1, *suite.source.shape)
    return noise, torch.full((1,), 0.5), suite.condition(stage, suite.source.null(1))


def pass_flops(suite: Suite, stage: str) -> int:
    """Return the operations of one pass of one clip through a stage's network."""
    host = suite.host(stage)
    x, t, cond = _one_clip(suite, stage)
    return count_flops(lambda: host(x, t, t if host.mean_flow else None, cond))


def predicted_flops(suite: Suite, stage: str, predictor: str) -> int:
    """Return the operations of a predicted step: embedders, predictor and head."""
    host = suite.host(stage)
    x, t, cond = _one_clip(suite, stage)
    cache = host.embed(x, t, t if host.mean_flow else None, cond).tokens
    step = PredictorStep(host, suite.predictor(predictor))
    return count_flops(lambda: step(x, t, t, cond, cache))


def describe_host(suite: Suite, stage: str) -> dict[str, Any]:
    """Return parameters and operations of one pass of a stage's network."""
    parameters = sum(p.numel() for p in suite.host(stage).parameters())
    return {"parameters": parameters, "flops": pass_flops(suite, stage)}


def describe_predictor(
    suite: Suite, stage: str, predictor: str, noise: Tensor, cond: Condition, repeats: int
) -> dict[str, Any]:
    """Return what a predictor costs beside the network that it stands in for.

    Shares are of the host, and of a whole step with embedders and head where operations or time
    are compared. A step is short, so that the fastest of the timed ones is taken: whatever
    interrupts it only makes it longer.

    Args:
        suite: the models.
        stage: stage of the host.
        predictor: stage of the predictor.
        noise: starting points to time with [B, C, F, H, W].
        cond: prompts without guidance, batch B.
        repeats: timed steps.
    """
    host, network = suite.host(stage), suite.predictors[predictor]
    parameters = sum(p.numel() for p in host.parameters())
    own = sum(p.numel() for p in network.parameters())
    times = measure_step(host, network, noise, suite.condition(stage, cond), repeats)
    full, predicted = Timing.of(times["full"]), Timing.of(times["predicted"])
    flops = predicted_flops(suite, stage, predictor)
    return {
        "host": stage,
        "parameters": own,
        "parameter_share": own / parameters,
        "flops": flops,
        "flop_share": flops / pass_flops(suite, stage),
        "seconds_full": full.model_dump(),
        "seconds_predicted": predicted.model_dump(),
        "time_share": predicted.low / full.low,
    }


def path_curvature(
    suite: Suite, stage: str, steps: int, noise: Tensor, cond: Condition
) -> dict[str, Any]:
    """Return how far a stage's sampling paths are from straight lines.

    On straight paths any number of steps gives the same sample and few-step sampling loses
    nothing; see :class:`disca.eval.scores.Curvature` for the three measures.

    Args:
        suite: the models.
        stage: the stage to sample, which takes guidance or needs none.
        steps: number of steps, at least 2.
        noise: starting points [B, C, F, H, W].
        cond: prompts without guidance, batch B.

    Returns:
        Stage, steps and the measures by name.
    """
    schedule = suite.schedule(steps)
    cond = suite.condition(stage, cond)
    result = cached_sample(suite.host(stage), NoCache(), noise, schedule, cond, trajectory=True)
    shape = curvature(torch.stack([noise, *result.trajectory]), schedule)
    return {"stage": stage, "steps": steps, **shape.as_dict()}
