# SPDX-License-Identifier: Apache-2.0
"""Time denoising loops against each other, and measure the memory that they take."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from disca.cache import Store
from disca.compare.scoring import Inputs
from disca.models import PredictorStep
from disca.sample import cached_sample
from disca_kernels import mean_velocity_step
from disca_kernels.testing.memory import AllocatedPeak, allocated_peak

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache import CachePolicy, CacheReport, Policy, StepInput, StepOutput
    from disca.compare.plan import RowPlan
    from disca.compare.suite import Suite
    from disca.models.condition import Condition
    from disca.models.dit import DiT
    from disca.models.state import State

__all__ = ["Seconds", "interleaved", "measure_step", "row_peak", "time_row"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    """Wall time of one run.

    Attributes:
        loop: the denoising loop.
        total: prompts encoded, noise drawn, the loop, clips turned into bytes.
    """

    loop: float
    total: float


def interleaved(
    runs: Mapping[str, Callable[[], Result]],
    repeat: int,
    *,
    advance: Callable[[str], object] | None = None,
) -> dict[str, Result]:
    """Run every entry once, in an order that changes with ``repeat``.

    Whatever slows the machine down for a while then slows all of them, and no entry always follows
    the same neighbour.

    Args:
        runs: name to a function that returns what it measured.
        repeat: number of the repeat, which decides the order.
        advance: called with the name after each run.

    Returns:
        Name to what was measured.
    """
    order = random.Random(repeat)
    measured = {}
    for name in order.sample(list(runs), len(runs)):
        measured[name] = runs[name]()
        if advance is not None:
            advance(name)
    return measured


def time_row(suite: Suite, row: RowPlan, policy: Policy, inputs: Inputs, seed: int) -> Seconds:
    """Time one run of a row, the loop alone and end to end.

    Args:
        suite: the models.
        row: model and steps.
        policy: the row's policy.
        inputs: what prompts to follow and how many clips.
        seed: seed of the noise.
    """
    prompts = suite.prompts_of(inputs.real)
    started = time.perf_counter()
    cond = suite.source.encode(prompts) if prompts else inputs.real.condition
    cond = suite.condition(row.model, cond)
    noise = torch.randn(inputs.noise.shape, generator=torch.Generator().manual_seed(seed))
    result = cached_sample(suite.host(row.model), policy, noise, suite.schedule(row.steps), cond)
    result.x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
    return Seconds(result.seconds, time.perf_counter() - started)


def row_peak(suite: Suite, row: RowPlan, policy: CachePolicy, inputs: Inputs) -> int:
    """Return the bytes that a row's loop takes at most beyond weights and inputs, of one clip.

    On a CPU, where watching takes longer than running, only some late steps are watched: from a
    computed one that skipped ones follow, over the next such, to the computed one after it. By then
    the cache is full, and all of it is made anew but for what the policy carries through, which is
    added.
    """
    cond = suite.condition(row.model, inputs.real.condition)
    host, schedule = suite.host(row.model), suite.schedule(row.steps)

    def run(policy: Policy) -> CacheReport:
        return cached_sample(host, policy, inputs.noise, schedule, cond).report

    if inputs.noise.is_cuda:
        return allocated_peak(lambda: run(policy), inputs.noise.device) // len(inputs.noise)
    report = run(policy)
    followed = [step for step in report.computed if step + 1 in report.skipped]
    first, late = (followed[-2:][0], followed[-1]) if followed else (max(row.steps - 2, 0),) * 2
    last = next((step for step in report.computed if step > late), row.steps - 1)
    watched = _Watched(policy, first, last)
    with suppress(_Seen):
        run(watched)
    return watched.peak // len(inputs.noise)


class _Seen(Exception):
    """The steps to watch are over."""


class _Watched:
    """A policy whose memory is measured from one step to another."""

    idle_ok = True

    def __init__(self, policy: CachePolicy, first: int, last: int) -> None:
        self.policy, self.first, self.last, self.peak = policy, first, last, 0
        self.reset, self.report = policy.reset, policy.report

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    def advance(self, step: StepInput) -> StepOutput:
        """Take one step."""
        store = self.policy.store
        if step.index == self.first:
            self._before = dict(store)
            self._watch = AllocatedPeak(step.x.device)
            self._watch.start()
        taken = self.policy.advance(step)
        if step.index == self.last:
            carried = Store()
            carried.update({k: x for k, x in store.items() if self._before.get(k) is x})
            self.peak = self._watch.stop() + carried.nbytes()
            raise _Seen
        return taken


@torch.no_grad()
def measure_step(
    host: DiT,
    predictor: Callable[[State, Tensor], Tensor],
    noise: Tensor,
    cond: Condition,
    repeats: int,
) -> dict[str, list[float]]:
    """Time one full step and one predicted step, from sample to sample.

    Args:
        host: the network.
        predictor: its predictor.
        noise: starting points [B, C, F, H, W].
        cond: prompts with guidance, batch B.
        repeats: how often each is timed.

    Returns:
        "full" and "predicted" to their seconds, one a repeat.
    """
    step = PredictorStep(host, predictor)
    t, r = noise.new_full((len(noise),), 0.8), noise.new_full((len(noise),), 0.7)
    end = r if host.mean_flow else None
    cache = host.run(host.embed(noise, t, end, cond)).tokens

    def full() -> float:
        started = time.perf_counter()
        mean_velocity_step(noise, host.head(host.run(host.embed(noise, t, end, cond))), t, r)
        return time.perf_counter() - started

    def predicted() -> float:
        started = time.perf_counter()
        step(noise, t, r, cond, cache)
        return time.perf_counter() - started

    runs = {"full": full, "predicted": predicted}
    measured = [interleaved(runs, repeat) for repeat in range(repeats + 1)]
    # The first of each warms up.
    return {name: [each[name] for each in measured[1:]] for name in runs}
