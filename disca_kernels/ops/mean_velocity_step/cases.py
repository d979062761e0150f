# SPDX-License-Identifier: Apache-2.0
"""Inputs of mean_velocity_step and what they cost on paper, for its tests and its benchmark."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disca_kernels.testing.drawing import Operands

FLOPS_PER_ELEMENT = {"fwd": 2, "bwd": 3, "jvp": 6}
"""Multiplications and additions of each element of x in each mode."""


@dataclass(frozen=True)
class MeanVelocityStepCase:
    """One shape of a step.

    Attributes:
        shape: of x, the batch first.
        x_dtype: of x.
        u_dtype: of u; None means that of x.
        time_dtype: of t and r.
    """

    shape: tuple[int, ...]
    x_dtype: torch.dtype = torch.float32
    u_dtype: torch.dtype | None = None
    time_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Name the case in test and benchmark reports."""
        dtypes = [self.x_dtype, self.u_dtype or self.x_dtype, self.time_dtype]
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return "x".join(map(str, self.shape)) + f"-{names[0]}-u_{names[1]}-times_{names[2]}"

    @property
    def dtype(self) -> torch.dtype:
        """The coarser of both dtypes: what the errors of all results are measured by."""
        return max(self.x_dtype, self.u_dtype or self.x_dtype, key=lambda d: torch.finfo(d).eps)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the call: there are none."""
        return {}

    def operands(self, seed: int = 0, device: str | torch.device = "cpu") -> Operands:
        """Draw normal samples, slices of larger tensors, and times with 0 <= r <= t <= 1."""
        generator = torch.Generator().manual_seed(seed)
        larger = (self.shape[0], *(n + 2 for n in self.shape[1:]))
        inside = (slice(None), *(slice(1, n + 1) for n in self.shape[1:]))

        def normal(dtype: torch.dtype | None) -> Tensor:
            full = torch.randn(larger, generator=generator).to(device, dtype or self.x_dtype)
            return full[inside]

        def times() -> Tensor:
            drawn = torch.rand(2, self.shape[0], generator=generator, dtype=torch.float64)
            return drawn.to(device, self.time_dtype)

        earlier, later = times().sort(0).values
        primals = (normal(None), normal(self.u_dtype), later, earlier)
        tangents = (normal(None), normal(self.u_dtype), *times())
        return Operands(primals, tangents, (normal(None),))

    def flops(self, mode: str) -> int:
        """Count floating-point operations of "fwd", "bwd" or "jvp"."""
        return FLOPS_PER_ELEMENT[mode] * torch.Size(self.shape).numel()

    def bytes_moved(self, mode: str) -> int:
        """Count the bytes that `mode` must read and write once."""
        samples, velocities, times = {
            "fwd": (2, 1, 2),  # x, x_r; u; t, r
            "bwd": (1, 2, 4),  # the gradient of x_r, which is that of x; u, du; t, r, dt, dr
            "jvp": (4, 2, 4),  # x and x_r, u, t and r, and their tangents
        }[mode]
        wide = (self.u_dtype or self.x_dtype).itemsize
        per_element = samples * self.x_dtype.itemsize + velocities * wide
        return (
            per_element * torch.Size(self.shape).numel()
            + times * self.shape[0] * self.time_dtype.itemsize
        )


def mean_velocity_step_in_dtype(x: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Compute mean_velocity_step as a sampler writes it, in the wider of both dtypes."""
    step = (t - r).to(torch.promote_types(x.dtype, u.dtype)).reshape(-1, *(1,) * (x.ndim - 1))
    return (x - step * u).to(x.dtype)
