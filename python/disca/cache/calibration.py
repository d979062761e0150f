# SPDX-License-Identifier: Apache-2.0
"""What a calibrated policy learned of a model from uncached runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model over one schedule at one resolution.

    Attributes:
        policy: name of the policy that they are for.
        schedule: times [steps + 1] of the runs.
        shape: (C, F, H, W) of the latent.
        tensors: what was measured, by name.
    """

    policy: str
    schedule: tuple[float, ...]
    shape: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
