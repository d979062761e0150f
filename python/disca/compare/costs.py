# SPDX-License-Identifier: Apache-2.0
"""What the models are: operations, parameters, time of a step, shape of the sampling paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from disca.cache import NoCache
from disca.compare.flops import count_flops
from disca.compare.methods import Method
from disca.compare.results import Timing
from disca.compare.timing import measure_step
from disca.eval.scores import curvature
from disca.models import PredictorStep
from disca.sample import cached_sample, flow_shift_schedule, resolve_full_steps

if TYPE_CHECKING:
    from disca.compare.suite import Form, Suite
    from disca.models.condition import Condition

__all__ = ["describe_models", "method_flops", "pass_flops", "path_curvature", "skip_flops"]


def _one_clip(suite: Suite) -> tuple[Tensor, Tensor, Condition]:
    noise = torch.zeros(1, *suite.source.shape)
    return noise, torch.full((1,), 0.5), suite.source.null(1)


def pass_flops(suite: Suite, stage: str) -> int:
    """Return the operations of one pass of one clip through a stage's network."""
    host = suite.host(stage)
    x, t, cond = _one_clip(suite)
    cond = cond.with_guidance(suite.sampling.guidance if host.config.guidance_embed else None)
    return count_flops(lambda: host(x, t, t if host.mean_flow else None, cond))


def skip_flops(suite: Suite, stage: str, form: Form | None) -> int:
    """Return the operations of a skipped step: embedders, head, and the predictor if any."""
    host = suite.host(stage)
    x, t, cond = _one_clip(suite)
    cond = cond.with_guidance(suite.sampling.guidance)
    end = t if host.mean_flow else None
    state = host.embed(x, t, end, cond)
    if form is not None:
        step = PredictorStep(host, suite.predictor(form))
        return count_flops(lambda: step(x, t, t, cond, state.tokens))
    return count_flops(lambda: host.head(host.embed(x, t, end, cond)))


def method_flops(suite: Suite, method: Method) -> int:
    """Return the operations of one clip's denoising loop."""
    one = pass_flops(suite, method.model)
    if method.policy == "cfg":
        return 2 * method.steps * one
    if method.full_steps is None:
        return method.steps * one
    full = len(resolve_full_steps(method.full_steps, method.steps))
    form = (method.form or suite.sampling.form) if method.policy == "disca" else None
    return full * one + (method.steps - full) * skip_flops(suite, method.model, form)


def path_curvature(
    suite: Suite, stage: str, steps: int, noise: Tensor, cond: Condition
) -> dict[str, float]:
    """Return how far a stage's sampling paths are from straight lines.

    On straight paths any number of steps gives the same sample and few-step sampling loses
    nothing; see :class:`disca.eval.scores.Curvature` for the three measures.

    Args:
        suite: the models.
        stage: the stage to sample.
        steps: number of steps, at least 2.
        noise: starting points [B, C, F, H, W].
        cond: prompts, batch B.

    Returns:
        The measures by name.
    """
    schedule = flow_shift_schedule(steps, suite.sampling.shift)
    cond = cond.with_guidance(suite.sampling.guidance)
    result = cached_sample(suite.host(stage), NoCache(), noise, schedule, cond, trajectory=True)
    return curvature(torch.stack([noise, *result.trajectory]), schedule).as_dict()


def describe_models(suite: Suite, noise: Tensor, cond: Condition, repeats: int) -> dict[str, Any]:
    """Return parameters, operations and time of the student and of each predictor.

    Args:
        suite: the models.
        noise: starting points to time with [B, C, F, H, W].
        cond: prompts, batch B.
        repeats: timed steps.

    Returns:
        ``"host"`` and ``"predictors"``, by form; shares are of the host, and of a whole step with
        embedders and head where operations or time are compared. A step is short, so that the
        fastest of the timed ones is taken: whatever interrupts it only makes it longer.
    """
    host = suite.host("rmeanflow")
    parameters = sum(p.numel() for p in host.parameters())
    flops = pass_flops(suite, "rmeanflow")
    described: dict[str, Any] = {"host": {"parameters": parameters, "flops": flops}}
    described["predictors"] = {}
    for form, predictor in suite.predictors.items():
        times = measure_step(suite, form, noise, cond, repeats)
        full, predicted = Timing.of(times["full"]), Timing.of(times["predicted"])
        own = sum(p.numel() for p in predictor.parameters())
        skip = skip_flops(suite, "rmeanflow", form)
        described["predictors"][form] = {
            "parameters": own,
            "parameter_share": own / parameters,
            "flops": skip,
            "flop_share": skip / flops,
            "seconds_full": full.model_dump(),
            "seconds_predicted": predicted.model_dump(),
            "time_share": predicted.low / full.low,
        }
    return described
