# SPDX-License-Identifier: Apache-2.0
"""Time schedules: which noise levels a sampler visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disca.errors import UserError

__all__ = ["check_schedule", "flow_shift_schedule"]


def flow_shift_schedule(steps: int, shift: float = 5.0) -> Tensor:
    """Return the times of a flow-matching sampler, from noise (1) to data (0).

    ``sigma_i = 1 - i / steps`` and ``t_i = shift * sigma_i / (1 + (shift - 1) * sigma_i)``. A shift
    above 1 spends more of the steps near the noise end, where a video's layout is decided; step i
    goes from ``t_i`` to ``t_{i+1}``. This is the schedule of HunyuanVideo's
    FlowMatchDiscreteScheduler with ``reverse=True``, which DisCa samples with (shift 5, 20 steps).

    Args:
        steps: number of steps, at least 1.
        shift: the flow shift, above 0; 1 gives equal steps.

    Returns:
        Tensor [steps + 1], float32, strictly decreasing, first 1 and last 0.

    Raises:
        UserError: ``steps`` below 1 or ``shift`` not a positive finite number.
    """
    if steps < 1:
        raise UserError(f"a schedule needs at least 1 step, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"the flow shift must be a finite number above 0, got {shift}")
    sigma = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return (shift * sigma / (1 + (shift - 1) * sigma)).to(torch.float32)


def check_schedule(schedule: Tensor) -> None:
    """Refuse a schedule that a sampler cannot follow.

    Args:
        schedule: times [steps + 1].

    Raises:
        UserError: not one-dimensional, fewer than two times, times outside [0, 1], or not
            strictly decreasing.
    """
    if schedule.ndim != 1 or schedule.numel() < 2:
        raise UserError(
            "a schedule is a one-dimensional tensor of at least 2 times, "
            f"got shape {tuple(schedule.shape)}"
        )
    if not bool(torch.isfinite(schedule).all()) or not float(schedule[-1]) >= 0:
        raise UserError("schedule times must be finite and in [0, 1]")
    if float(schedule[0]) > 1:
        raise UserError(f"schedule times must be in [0, 1], the first is {float(schedule[0])}")
    if not bool((schedule[1:] < schedule[:-1]).all()):
        raise UserError("schedule times must decrease from noise (1) to data (0)")
