# SPDX-License-Identifier: Apache-2.0
"""Autograd of SwiGLU."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.swiglu.reference import swiglu_jvp_reference, swiglu_reference

Operands = tuple[Tensor | None, ...]


def _fake(operands: Operands, options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x = operands[0]
    assert x is not None
    shape = (*x.shape[:2], x.shape[2] // 2)
    return [torch.empty(shape, dtype=x.dtype, device=x.device)]


_OPERATION = FusedOperation(
    "swiglu",
    operands=("x", "bias"),
    options="bool gate_first",
    reference=swiglu_reference,
    jvp_reference=swiglu_jvp_reference,
    fake=_fake,
    unbatched=("bias",),
)


def value(operands: Operands, gate_first: bool, backend: Backend) -> Tensor:
    """Compute y, differentiable in the modes that the backend offers."""
    (y,) = _OPERATION.value(operands, (gate_first,), backend)
    return y


def value_and_tangent(
    primals: Operands, tangents: Operands, gate_first: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute (y, y_dot) in one pass; autograd tracks y alone."""
    (y,), (y_dot,) = _OPERATION.value_and_tangent(primals, tangents, (gate_first,), backend)
    return y, y_dot
