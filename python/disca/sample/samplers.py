# SPDX-License-Identifier: Apache-2.0
"""Samplers: functions that carry noise to data along a schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from disca.cache import CacheReport, LearnedPredictor, Policy, StepInput
from disca.errors import UserError
from disca.sample.schedule import check_schedule
from disca_kernels import mean_velocity_step

if TYPE_CHECKING:
    from disca.models.condition import Condition
    from disca.models.host import Host
    from disca.models.state import State

__all__ = [
    "SampleResult",
    "Step",
    "cached_sample",
    "cfg_velocity",
    "disca_sample",
    "euler",
    "mean_velocity",
]


@dataclass(frozen=True)
class Step:
    """What a sampler's callback sees after one step.

    Attributes:
        index: the step, counted from 0.
        t: the time that the step started from.
        r: the time that it reached.
        x: the sample at ``r`` [B, ...].
        full: whether the whole network ran.
    """

    index: int
    t: float
    r: float
    x: Tensor
    full: bool = True


Callback = Callable[[Step], None]


class VelocityModel(Protocol):
    """A network that is called as ``model(x, t, r, cond=cond)`` and returns a velocity."""

    def __call__(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, *, cond: Condition
    ) -> Tensor: ...


@dataclass
class SampleResult:
    """What :func:`cached_sample` returns.

    Attributes:
        x: the sample [B, ...], float32 (float64 if the noise was).
        report: what the policy hooked, computed, skipped and held.
        seconds: wall time of the denoising loop.
        trajectory: the samples after each step, if they were asked for.
    """

    x: Tensor
    report: CacheReport
    seconds: float
    trajectory: list[Tensor] = field(default_factory=list)

    @property
    def full_passes(self) -> int:
        """Steps that ran the whole network."""
        return len(self.report.computed)

    @property
    def predictor_passes(self) -> int:
        """Steps that the policy filled in."""
        return len(self.report.skipped)

    @property
    def cache_bytes(self) -> int:
        """The most memory that the cache held between two steps."""
        return self.report.cache_bytes


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Tensor,
    callback: Callback | None = None,
) -> Tensor:
    """Follow an instantaneous velocity with Euler's method.

    ``x_{i+1} = x_i - (t_i - t_{i+1}) * v(x_i, t_i)``, accumulated in float32.

    Args:
        velocity: maps x [B, ...] and t [B] to a velocity [B, ...].
        x: noise [B, ...].
        schedule: times [steps + 1], decreasing.
        callback: called with a :class:`Step` after each step.

    Returns:
        The sample [B, ...], float32 (float64 if ``x`` was).

    Raises:
        UserError: a schedule that does not decrease within [0, 1].
    """
    return mean_velocity(lambda x_t, t, r: velocity(x_t, t), x, schedule, callback)


def mean_velocity(
    u: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Tensor,
    callback: Callback | None = None,
) -> Tensor:
    """Follow an average velocity (MeanFlow, arXiv 2505.13447).

    ``x_r = x_t - (t - r) * u(x_t, t, r)``, accumulated in float32.

    Args:
        u: maps x [B, ...], t [B] and r [B] to the average velocity between r and t, [B, ...].
        x: noise [B, ...].
        schedule: times [steps + 1], decreasing; step i goes from ``schedule[i]`` to
            ``schedule[i + 1]``.
        callback: called with a :class:`Step` after each step.

    Returns:
        The sample [B, ...], float32 (float64 if ``x`` was).

    Raises:
        UserError: a schedule that does not decrease within [0, 1].
    """
    x, times = _start(x, schedule)
    for index, (t, r) in enumerate(pairwise(times)):
        start, end = t.expand(len(x)), r.expand(len(x))
        x = mean_velocity_step(x, u(x, start, end), start, end)
        if callback is not None:
            callback(Step(index, float(t), float(r), x))
    return x


def cfg_velocity(
    model: VelocityModel, cond: Condition, null: Condition, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a velocity guided by classifier-free guidance, two passes a call.

    ``v = v_null + guidance * (v_cond - v_null)``. The two passes are separate calls, so that each
    costs what one pass of a distilled model costs.

    Args:
        model: called as ``model(x, t, cond=...)``.
        cond: the condition, batch B.
        null: the empty condition, batch B.
        guidance: the scale; 1 is the plain conditional velocity.

    Returns:
        A function of x [B, ...] and t [B].
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_null = model(x, t, cond=null)
        return v_null + guidance * (model(x, t, cond=cond) - v_null)

    return velocity


@torch.no_grad()
def cached_sample(
    host: Host,
    policy: Policy,
    x: Tensor,
    schedule: Tensor,
    cond: Condition,
    *,
    callback: Callback | None = None,
    trajectory: bool = False,
) -> SampleResult:
    """Sample a host under a cache policy.

    The policy takes the steps; most of them leave embedders and head to the host at every step,
    skipped or not, and replace the blocks between. A host that takes an end time gets
    ``r = schedule[i + 1]``. The update is accumulated in float32.

    Args:
        host: the network, in evaluation mode.
        policy: decides the steps; it is reset first.
        x: noise [B, C, F, H, W].
        schedule: times [steps + 1], decreasing.
        cond: the condition, batch B.
        callback: called with a :class:`Step` after each step.
        trajectory: keep the sample after each step.

    Returns:
        The sample with the policy's report and the wall time.

    Raises:
        UserError: a bad schedule, a list of full steps that does not fit it, or a policy that
            hooked or skipped nothing though it is there to skip.
    """
    check_schedule(schedule)
    policy.reset(host, schedule.tolist())
    x, times = _start(x, schedule)
    kept: list[Tensor] = []
    started = _clock(x)
    for index, (t, r) in enumerate(pairwise(times)):
        out = policy.advance(StepInput(index, x, t.expand(len(x)), r.expand(len(x)), cond))
        x = out.x
        if trajectory:
            kept.append(x)
        if callback is not None:
            callback(Step(index, float(t), float(r), x, out.full))
    seconds = _clock(x) - started
    report = policy.report()
    if not policy.idle_ok and not (report.hooked and report.skipped):
        raise UserError(
            f"policy {report.policy!r} hooked {len(report.hooked)} parts of the host and skipped "
            f"{len(report.skipped)} of {len(times) - 1} steps: it changed nothing; raise its "
            "threshold or interval, or use the policy 'none' if that is meant"
        )
    return SampleResult(x, report, seconds, trajectory=kept)


def disca_sample(
    host: Host,
    predictor: Callable[[State, Tensor], Tensor],
    x: Tensor,
    schedule: Tensor,
    cond: Condition,
    full_steps: str | Sequence[int],
    *,
    callback: Callback | None = None,
    trajectory: bool = False,
    allow_idle: bool = False,
) -> SampleResult:
    """Sample with a learned predictor at every step that is not a full step (DisCa, section 3.3).

    Args:
        host: the distilled network, in evaluation mode.
        predictor: maps the embedded state and the cached tokens [B, N, C] to tokens [B, N, C].
        x: noise [B, C, F, H, W].
        schedule: times [steps + 1], decreasing.
        cond: the condition, batch B.
        full_steps: a name such as ``"n4"``, ``"every:4"``, or step numbers; see
            :func:`disca.sample.resolve_full_steps`.
        callback: called with a :class:`Step` after each step.
        trajectory: keep the sample after each step.
        allow_idle: accept a list in which every step is full.

    Returns:
        The sample with its counts and wall time.

    Raises:
        UserError: a bad schedule or a list of full steps that does not fit it.
    """
    check_schedule(schedule)
    policy = LearnedPredictor(predictor, full_steps, allow_idle=allow_idle)
    return cached_sample(host, policy, x, schedule, cond, callback=callback, trajectory=trajectory)


def _start(x: Tensor, schedule: Tensor) -> tuple[Tensor, Tensor]:
    """Check the schedule; return the noise in its accumulation type and the times beside it."""
    check_schedule(schedule)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, schedule.to(x.device, torch.promote_types(schedule.dtype, torch.float32))


def _clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
