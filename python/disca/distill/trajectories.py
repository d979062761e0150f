# SPDX-License-Identifier: Apache-2.0
"""A bank of the student's own sampling trajectories, to train the predictor where it will run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from disca.data.source import ClipSource
from disca.distill.batch import draw_batch
from disca.distill.config import GuidanceRange
from disca.models.condition import Condition
from disca.models.dit import DiT

__all__ = ["TrajectoryBank", "record_trajectories"]


@dataclass(frozen=True)
class TrajectoryBank:
    """What the student saw and gave at every step of some sampling runs.

    Attributes:
        x: Latents before each step ``[S, K, C, F, H, W]``.
        velocity: Average velocities of each step, of the shape of x.
        tokens: Last-layer tokens of each step ``[S, K, N, C]``.
        condition: Conditions of the K runs.
    """

    x: Tensor
    velocity: Tensor
    tokens: Tensor
    condition: Condition

    def __len__(self) -> int:
        """Number of runs."""
        return self.x.shape[1]


@torch.no_grad()
def record_trajectories(
    host: DiT,
    source: ClipSource,
    schedule: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    guidance: GuidanceRange,
    batch: int = 64,
) -> TrajectoryBank:
    """Sample training prompts with the student and keep every step.

    Args:
        host: The student.
        source: Gives the prompts.
        schedule: Times 1 ... 0 ``[S + 1]``.
        count: Runs K.
        generator: Source of prompts, noise and guidance scales.
        guidance: Guidance scale of the runs, fixed or a range.
        batch: Runs sampled at once.

    Returns:
        The bank, on the student's device.
    """
    device = next(host.parameters()).device
    parts: list[TrajectoryBank] = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        drawn = draw_batch(source, size, generator, guidance=guidance, device=device)
        x = drawn.noise
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t, r in pairwise(schedule):
            end = r.to(device).expand(size) if host.mean_flow else None
            state = host.run(host.embed(x, t.to(device).expand(size), end, drawn.condition))
            u = host.head(state).float()
            steps.append((x, u, state.tokens))
            x = x - (t - r).to(device) * u
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        parts.append(TrajectoryBank(columns[0], columns[1], columns[2], drawn.condition))
    return TrajectoryBank(
        torch.cat([p.x for p in parts], dim=1),
        torch.cat([p.velocity for p in parts], dim=1),
        torch.cat([p.tokens for p in parts], dim=1),
        Condition.cat([p.condition for p in parts]),
    )
