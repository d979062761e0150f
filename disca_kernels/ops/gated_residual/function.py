# SPDX-License-Identifier: Apache-2.0
"""Autograd of the gated residual."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.gated_residual.reference import (
    gated_residual_jvp_reference,
    gated_residual_reference,
)

Operands = tuple[Tensor | None, ...]

OPERANDS = ("x", "y", "gate")


def _fake(operands: tuple[Any, ...], options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x = operands[0]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]


_OPERATION = FusedOperation(
    "gated_residual",
    operands=OPERANDS,
    reference=gated_residual_reference,
    jvp_reference=gated_residual_jvp_reference,
    fake=_fake,
    saved=("y", "gate"),
    passthrough={"x": 0},
)


def value(operands: Operands, backend: Backend) -> Tensor:
    """Compute x + gate * y, differentiable in the modes that the backend offers."""
    (out,) = _OPERATION.value(operands, (), backend)
    return out


def value_and_tangent(
    primals: Operands, tangents: Operands, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute value and tangent in one pass; autograd tracks the value alone."""
    (out,), (out_dot,) = _OPERATION.value_and_tangent(primals, tangents, (), backend)
    return out, out_dot
