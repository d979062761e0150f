# SPDX-License-Identifier: Apache-2.0
"""Autograd of the gated residual with modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.gated_residual_adaln.reference import (
    gated_residual_adaln_jvp_reference,
    gated_residual_adaln_reference,
)

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]
Pair = tuple[Tensor, Tensor]

OPERANDS = ("x", "y", "gate", "shift", "scale", "weight", "bias")


def _by_name(eps: float, rms: bool) -> dict[str, Any]:
    return {"eps": eps, "norm": "rms" if rms else "layer"}


def _reference(*arguments: Any) -> Pair:
    operands, options = arguments[:7], arguments[7:]
    return gated_residual_adaln_reference(*operands, **_by_name(*options))


def _jvp_reference(primals: Operands, tangents: Operands, *options: Any) -> tuple[Pair, Pair]:
    return gated_residual_adaln_jvp_reference(primals, tangents, **_by_name(*options))


def _fake(operands: tuple[Any, ...], options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x = operands[0]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2)]


# h is computed from the x_new that is returned, so x_new is kept in place of x, and its rows are
# normalised again.
_OPERATION = FusedOperation(
    "gated_residual_adaln",
    operands=OPERANDS,
    options="float eps, bool rms",
    outputs=2,
    reference=_reference,
    jvp_reference=_jvp_reference,
    fake=_fake,
    saved=("result0", "y", "gate", "scale", "weight", "bias"),
    like={"x": "result0", "shift": "scale"},
    unbatched=("weight", "bias"),
)


def value(operands: Operands, options: Options, backend: Backend) -> Pair:
    """Compute (x_new, h), differentiable in the modes that the backend offers."""
    x_new, h = _OPERATION.value(operands, options, backend)
    return x_new, h


def value_and_tangent(
    primals: Operands, tangents: Operands, options: Options, backend: Backend
) -> tuple[Pair, Pair]:
    """Compute (x_new, h) and their tangents in one pass; autograd tracks the values alone."""
    (x_new, h), (x_new_dot, h_dot) = _OPERATION.value_and_tangent(
        primals, tangents, options, backend
    )
    return (x_new, h), (x_new_dot, h_dot)
