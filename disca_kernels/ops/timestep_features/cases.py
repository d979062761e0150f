# SPDX-License-Identifier: Apache-2.0
"""Inputs of timestep_features and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FLOPS_PER_FREQUENCY = {"fwd": 1, "bwd": 6, "jvp": 7}


class Operands(NamedTuple):
    """What a call of timestep_features and of its derivatives takes."""

    t: Tensor
    t_dot: Tensor
    width: Tensor
    cotangent: Tensor


@dataclass(frozen=True)
class TimestepFeaturesCase:
    """One shape of the time features.

    Attributes:
        batch: B.
        dim: number of features.
        dtype: of the times.
    """

    batch: int
    dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        return f"b{self.batch}d{self.dim}-{str(self.dtype).removeprefix('torch.')}"

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw times in [0, 1] and widths in [0, 0.1], slices of larger tensors."""
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return torch.rand(2 * self.batch, generator=generator).to(device, self.dtype)[::2]

        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        cotangent = torch.randn(self.batch, self.dim + 3, generator=generator).to(device, wide)
        return Operands(draw(), draw() - 0.5, 0.1 * draw(), cotangent[:, 1 : self.dim + 1])

    def flops(self, mode: str) -> int:
        """Count multiplications and additions of "fwd", "bwd" or "jvp", not the sines."""
        return self.batch * (self.dim // 2) * _FLOPS_PER_FREQUENCY[mode]

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once: one row of features, or two."""
        rows = 2 if mode == "jvp" else 1
        return self.batch * self.dim * rows * max(self.dtype.itemsize, 4)
