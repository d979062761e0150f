# SPDX-License-Identifier: Apache-2.0
"""Autograd of adaptive norm modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
)

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]

OPERANDS = ("x", "shift", "scale", "weight", "bias")


def _by_name(eps: float, rms: bool) -> dict[str, Any]:
    return {"eps": eps, "norm": "rms" if rms else "layer"}


def _reference(*arguments: Any) -> Tensor:
    operands, options = arguments[:5], arguments[5:]
    return adaln_modulate_reference(*operands, **_by_name(*options))


def _jvp_reference(primals: Operands, tangents: Operands, *options: Any) -> tuple[Tensor, Tensor]:
    return adaln_modulate_jvp_reference(primals, tangents, **_by_name(*options))


def _fake(operands: tuple[Any, ...], options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x = operands[0]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]


# y is linear in shift, which no derivative needs; mean and deviation of a row are computed again
# from the row, which has to be read anyway.
_OPERATION = FusedOperation(
    "adaln_modulate",
    operands=OPERANDS,
    options="float eps, bool rms",
    reference=_reference,
    jvp_reference=_jvp_reference,
    fake=_fake,
    saved=("x", "scale", "weight", "bias"),
    like={"shift": "scale"},
    unbatched=("weight", "bias"),
)


def value(operands: Operands, options: Options, backend: Backend) -> Tensor:
    """Compute y, differentiable in the modes that the backend offers."""
    (y,) = _OPERATION.value(operands, options, backend)
    return y


def value_and_tangent(
    primals: Operands, tangents: Operands, options: Options, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute (y, y_dot) in one pass; autograd tracks y alone."""
    (y,), (y_dot,) = _OPERATION.value_and_tangent(primals, tangents, options, backend)
    return y, y_dot
