# SPDX-License-Identifier: Apache-2.0
"""Autograd of one step along a mean velocity."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.mean_velocity_step.reference import (
    mean_velocity_step_jvp_reference,
    mean_velocity_step_reference,
)

Operands = tuple[Tensor | None, ...]


def _fake(operands: Operands, options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x = operands[0]
    assert x is not None
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]


_OPERATION = FusedOperation(
    "mean_velocity_step",
    operands=("x", "u", "t", "r"),
    reference=mean_velocity_step_reference,
    jvp_reference=mean_velocity_step_jvp_reference,
    fake=_fake,
    saved=("u", "t", "r"),
    passthrough={"x": 0},
)


def value(operands: Operands, backend: Backend) -> Tensor:
    """Compute the sample at time r, differentiable in the modes that the backend offers."""
    (x_r,) = _OPERATION.value(operands, (), backend)
    return x_r


def value_and_tangent(
    primals: Operands, tangents: Operands, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute (x_r, x_r_dot) in one pass; autograd tracks x_r alone."""
    (x_r,), (x_r_dot,) = _OPERATION.value_and_tangent(primals, tangents, (), backend)
    return x_r, x_r_dot
