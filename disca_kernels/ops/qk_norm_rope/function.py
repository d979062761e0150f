# SPDX-License-Identifier: Apache-2.0
"""Autograd of query-key normalisation with rotary embedding."""

from typing import Any

from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.qk_norm_rope.reference import (
    qk_norm_rope_jvp_reference,
    qk_norm_rope_reference,
)
from disca_kernels.ops.qk_norm_rope.streams import empty_results

Operands = tuple[Tensor | None, ...]
Triple = tuple[Tensor, Tensor, Tensor]
Options = tuple[int, bool, float]


def _by_name(options: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("heads", "interleaved", "eps"), options, strict=True))


def _reference(*arguments: Any) -> Triple:
    operands, options = arguments[:8], arguments[8:]
    return qk_norm_rope_reference(*operands, **_by_name(options))


def _jvp_reference(primals: Operands, tangents: Operands, *options: Any) -> tuple[Triple, Triple]:
    return qk_norm_rope_jvp_reference(primals, tangents, **_by_name(options))


def _fake(operands: Operands, options: tuple[Any, ...], keep: bool) -> Triple:
    return empty_results(operands, options[0])


_OPERATION = FusedOperation(
    "qk_norm_rope",
    operands=(
        *("qkv", "q_weight", "k_weight", "cos", "sin"),
        *("context_qkv", "context_q_weight", "context_k_weight"),
    ),
    options="int heads, bool interleaved, float eps",
    outputs=3,
    reference=_reference,
    jvp_reference=_jvp_reference,
    fake=_fake,
    unbatched=(
        *("q_weight", "k_weight", "cos", "sin"),
        *("context_q_weight", "context_k_weight"),
    ),
    constant=("cos", "sin"),
)


def value(operands: Operands, options: Options, backend: Backend) -> Triple:
    """Compute queries, keys and values, differentiable in the modes that the backend offers."""
    q, k, v = _OPERATION.value(operands, options, backend)
    return q, k, v


def value_and_tangent(
    primals: Operands, tangents: Operands, options: Options, backend: Backend
) -> tuple[Triple, Triple]:
    """Compute values and tangents in one pass; autograd tracks the values alone."""
    (q, k, v), (q_dot, k_dot, v_dot) = _OPERATION.value_and_tangent(
        primals, tangents, options, backend
    )
    return (q, k, v), (q_dot, k_dot, v_dot)
