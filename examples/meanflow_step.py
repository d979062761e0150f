# SPDX-License-Identifier: Apache-2.0
"""Train an nn.Module of your own with MeanFlow (arXiv 2505.13447), one pass a step.

python examples/meanflow_step.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from disca.sample import flow_shift_schedule, mean_velocity
from disca_kernels import dual, timestep_features


class Field(nn.Module):
    """An average velocity u(x, t, r) of points in the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Map x [B, 2], t [B] and r [B] to the velocity between t and r [B, 2]."""
        times = [timestep_features(time, 16, scale=4.0) for time in (t, r)]
        return self.out(self.layers(torch.cat([x, *times], dim=-1)))


def ring(count: int) -> Tensor:
    """Draw points [B, 2] of a ring: the data."""
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def meanflow_loss(field: Field, data: Tensor) -> Tensor:
    """Return the MeanFlow loss of a batch; the target is v - (t - r) du/dt, held constant."""
    noise = torch.randn_like(data)
    t, r = torch.rand(2, len(data)).sort(dim=0, descending=True).values
    r = torch.where(torch.rand(len(data)) < 0.5, t, r)  # half learn the plain velocity
    x, v = torch.lerp(data, noise, t[:, None]), noise - data
    # One pass: u is tracked by autograd, du/dt along the flow is not.
    u, du_dt = dual.jvp(field, (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    target = v - (t - r)[:, None] * du_dt
    return (u - target).square().sum(-1).mean()


def main(steps: int = 800) -> None:
    """Train for some steps and sample in one and in four."""
    torch.manual_seed(0)
    field = Field()
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = meanflow_loss(field, ring(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    away = (torch.randn(512, 2).norm(dim=-1) - 1).abs().mean()
    print(f"noise: mean distance to the ring {away:.3f}")
    for count in (1, 4):
        with torch.no_grad():
            points = mean_velocity(field, torch.randn(512, 2), flow_shift_schedule(count, 1.0))
        distance = (points.norm(dim=-1) - 1).abs().mean()
        print(f"{count} steps: mean distance to the ring {distance:.3f}")


if __name__ == "__main__":
    main()
