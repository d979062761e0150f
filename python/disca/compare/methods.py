# SPDX-License-Identifier: Apache-2.0
"""The ways of sampling that the demo compares, each a row of its table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from disca.cache import LearnedPredictor, NoCache, Policy, Reuse
from disca.errors import UserError
from disca.sample import (
    SampleResult,
    cached_sample,
    cfg_velocity,
    euler,
    flow_shift_schedule,
    resolve_full_steps,
)

if TYPE_CHECKING:
    from disca.compare.suite import Form, Suite
    from disca.models.condition import Condition

__all__ = ["Method", "PolicyName", "default_methods", "run_method"]

PolicyName = Literal["cfg", "none", "disca", "reuse"]


@dataclass(frozen=True)
class Method:
    """One way of sampling.

    Attributes:
        key: name in results.json.
        label: name in tables.
        model: the stage whose weights are sampled.
        steps: number of steps.
        policy: "cfg" guides the teacher with two passes a step; "none" runs the model at every
            step; "disca" and "reuse" replace it at the steps that are not full.
        full_steps: see :func:`disca.sample.resolve_full_steps`; None without a cache.
        form: the predictor's form, for "disca".
        uncached: key of the method that does the same without the cache.
    """

    key: str
    label: str
    model: str
    steps: int
    policy: PolicyName = "none"
    full_steps: str | None = None
    form: Form | None = None
    uncached: str | None = None


def default_methods(forms: Sequence[Form], chosen: Form) -> list[Method]:
    """Return the demo's rows.

    Args:
        forms: the forms of the predictor that there are checkpoints of.
        chosen: the form of the main rows; any other form gets a row at n4.

    Returns:
        The methods; the first is the reference of all speed-ups.

    Raises:
        UserError: there is no checkpoint of the chosen form.
    """
    if chosen not in forms:
        raise UserError(f"no checkpoint of the predictor's {chosen!r} form; found: {list(forms)}")
    rows = [Method("teacher-50x2", "Teacher, CFG, 50 x 2", "teacher", 50, "cfg")]
    rows.append(Method("cfg-50", "CFG-distilled, 50", "cfg", 50))
    rows.append(Method("teacher-10x2", "Teacher, CFG, 10 x 2", "teacher", 10, "cfg"))
    rows += [Method(f"cfg-{n}", f"CFG-distilled, {n}", "cfg", n) for n in (20, 10)]
    rows += [Method(f"meanflow-{n}", f"MeanFlow, {n}", "meanflow", n) for n in (20, 10)]
    for n in (20, 10, 9):
        rows.append(Method(f"rmeanflow-{n}", f"Restricted MeanFlow, {n}", "rmeanflow", n))
    for name in ("n2", "n3", "n4"):
        rows.append(_disca(name, 20, chosen))
    rows.append(_disca("every:4", 10, chosen))
    for form in forms:
        if form != chosen:
            row = _disca("n4", 20, form)
            label = f"{row.label} ({form} predictor)"
            rows.append(
                Method(f"{row.key}-{form}", label, row.model, 20, "disca", "n4", form, row.uncached)
            )
    for name, steps in (("n4", 20), ("every:4", 10)):
        label = f"Reuse {name}, {steps} (training-free)"
        key = f"reuse-{name.replace(':', '')}"
        rows.append(
            Method(key, label, "rmeanflow", steps, "reuse", name, None, f"rmeanflow-{steps}")
        )
    return rows


def _disca(name: str, steps: int, form: Form) -> Method:
    key = f"disca-{name.replace(':', '')}"
    return Method(
        key, f"DisCa {name}, {steps}", "rmeanflow", steps, "disca", name, form, f"rmeanflow-{steps}"
    )


def run_method(
    suite: Suite,
    method: Method,
    noise: Tensor,
    cond: Condition,
    *,
    batch: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> SampleResult:
    """Sample with one method.

    Args:
        suite: the models.
        method: how.
        noise: the starting points [B, C, F, H, W].
        cond: the prompts, without guidance; batch B.
        batch: clips that are sampled at once; all of them by default.
        advance: called with the number of clips after each batch.

    Returns:
        The samples; pass counts of one clip, the largest cache and the seconds of all batches.

    Raises:
        UserError: a list of full steps that does not fit the number of steps.
    """
    size = batch or len(noise)
    parts = []
    for start in range(0, len(noise), size):
        rows = slice(start, start + size)
        parts.append(_run_batch(suite, method, noise[rows], cond.select(rows)))
        if advance is not None:
            advance(len(parts[-1].x))
    first = parts[0]
    return SampleResult(
        torch.cat([part.x for part in parts]),
        first.full_passes,
        first.predictor_passes,
        max(part.cache_bytes for part in parts),
        sum(part.seconds for part in parts),
    )


@torch.no_grad()
def _run_batch(suite: Suite, method: Method, noise: Tensor, cond: Condition) -> SampleResult:
    host = suite.host(method.model)
    guidance = suite.sampling.guidance
    schedule = flow_shift_schedule(method.steps, suite.sampling.shift)
    if method.policy == "cfg":
        velocity = cfg_velocity(host, cond, suite.source.null(len(noise)), guidance)
        started = time.perf_counter()
        x = euler(velocity, noise, schedule)
        seconds = time.perf_counter() - started
        return SampleResult(x, 2 * method.steps, 0, 0, seconds)
    policy = _policy(suite, method)
    return cached_sample(host, policy, noise, schedule, cond.with_guidance(guidance))


def _policy(suite: Suite, method: Method) -> Policy:
    if method.full_steps is None:
        return NoCache()
    full = resolve_full_steps(method.full_steps, method.steps)
    if method.policy == "reuse":
        return Reuse(full)
    form = method.form or suite.sampling.form
    return LearnedPredictor(suite.predictor(form), full)
