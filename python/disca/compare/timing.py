# SPDX-License-Identifier: Apache-2.0
"""Measure denoising loops against each other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from disca.compare.methods import Method, run_method
from disca.models import PredictorStep
from disca_kernels import mean_velocity_step

if TYPE_CHECKING:
    from torch import Tensor

    from disca.compare.suite import Form, Suite
    from disca.models.condition import Condition

__all__ = ["interleaved", "measure_methods", "measure_step"]


def interleaved(
    runs: Mapping[str, Callable[[], float]],
    repeats: int,
    *,
    advance: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Run every entry once a repeat, in an order that changes, and collect what each returns.

    Whatever slows the machine down for a while then slows all of them, and no entry always follows
    the same neighbour.

    Args:
        runs: name to a function that returns its seconds.
        repeats: how often each runs.
        advance: called with the name after each run.

    Returns:
        Name to the seconds of each repeat, in the order of the repeats.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            seconds[name].append(runs[name]())
            if advance is not None:
                advance(name)
    return seconds


def measure_methods(
    suite: Suite,
    methods: list[Method],
    noise: Tensor,
    cond: Condition,
    repeats: int,
    *,
    advance: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Time the denoising loop of each method; encoding prompts and writing clips are left out.

    Args:
        suite: the models.
        methods: what to time.
        noise: starting points [B, C, F, H, W], the same for all.
        cond: prompts, batch B.
        repeats: how often each is timed.
        advance: called with the name after each run.

    Returns:
        Key of the method to its seconds, one a repeat.
    """
    _warm_up(suite, methods, noise, cond)
    runs = {
        method.key: lambda method=method: run_method(suite, method, noise, cond).seconds
        for method in methods
    }
    return interleaved(runs, repeats, advance=advance)


@torch.no_grad()
def measure_step(
    suite: Suite, form: Form, noise: Tensor, cond: Condition, repeats: int
) -> dict[str, list[float]]:
    """Time one full step and one predicted step, from sample to sample.

    Args:
        suite: the models.
        form: the predictor's form.
        noise: starting points [B, C, F, H, W].
        cond: prompts, batch B.
        repeats: how often each is timed.

    Returns:
        "full" and "predicted" to their seconds, one a repeat.
    """
    host = suite.host("rmeanflow")
    step = PredictorStep(host, suite.predictor(form))
    cond = cond.with_guidance(suite.sampling.guidance)
    t, r = noise.new_full((len(noise),), 0.8), noise.new_full((len(noise),), 0.7)
    cache = host.run(host.embed(noise, t, r, cond)).tokens

    def full() -> float:
        started = time.perf_counter()
        mean_velocity_step(noise, host.head(host.run(host.embed(noise, t, r, cond))), t, r)
        return time.perf_counter() - started

    def predicted() -> float:
        started = time.perf_counter()
        step(noise, t, r, cond, cache)
        return time.perf_counter() - started

    runs = {"full": full, "predicted": predicted}
    interleaved(runs, 1)
    return interleaved(runs, repeats)


def _warm_up(suite: Suite, methods: list[Method], noise: Tensor, cond: Condition) -> None:
    """Run the shortest method of each model and policy once."""
    shortest: dict[tuple[str, str, str | None], Method] = {}
    for method in sorted(methods, key=lambda method: method.steps):
        shortest.setdefault((method.model, method.policy, method.form), method)
    for method in shortest.values():
        run_method(suite, method, noise, cond)
