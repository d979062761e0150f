# SPDX-License-Identifier: Apache-2.0
"""Public `gated_residual` and `gated_residual_jvp`: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, resolve
from disca_kernels.modulation import (
    check_modulation,
    check_tokens,
    check_update,
    widen_in_autocast,
)
from disca_kernels.ops.gated_residual import function
from disca_kernels.validation import check_operands, check_tangents

_OP = "gated_residual"


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, *, backend: str | Backend = "auto"
) -> Tensor:
    """Add a gated update to tokens: `x + gate * y`.

    This is how a diffusion transformer's adaLN-Zero block returns to its residual stream (Peebles
    and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748). Computed in float32
    (float64 inputs: in float64) and rounded once, when the result is stored.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, C] tokens, float32, bfloat16, float16 or float64 (float64 only on eager).
        y: [B, N, C] their update, in the dtype of x.
        gate: [B, C] for one row per sample, or [B, N, C] for one row per token; the dtype of x
            or float32. Nothing is broadcast: [B, 1, C] is accepted only if N is 1. Under
            `torch.autocast` y and gate may be of any half precision, which is widened if x is
            float32.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        [B, N, C], contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank, width, batch or device.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    given = (x, y, gate)
    if has_torch_function(given):
        result: Tensor = handle_torch_function(gated_residual, given, *given, backend=backend)
        return result
    operands = _widened(given, x)
    _check(operands)
    return function.value(operands, resolve(_OP, backend, *operands))


def gated_residual_jvp(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `gated_residual` and its directional derivative in one pass.

    The tangent is `x_dot + gate * y_dot + gate_dot * y`. The value is tracked by autograd; the
    tangent is not, and nothing of it is kept.

    Args:
        primals: `(x, y, gate)` as in `gated_residual`.
        tangents: `(x_dot, y_dot, gate_dot)`, each of the shape and dtype of its primal; None
            stands for zero and costs nothing.
        backend: as in `gated_residual`.

    Returns:
        The value and its tangent, both [B, N, C] in the dtype of x.

    Raises:
        ValueError: as `gated_residual`, or a tangent of another shape or device.
        TypeError: as `gated_residual`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    first, second = check_operands(_OP, ", ".join(function.OPERANDS), primals, tangents)
    relevant = (*first, *second)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            gated_residual_jvp, relevant, primals, tangents, backend=backend
        )
        return pair
    operands, dots = _widened(first, first[0]), _widened(second, first[0])
    _check(operands)
    check_tangents(_OP, function.OPERANDS, operands, dots)
    chosen = resolve(_OP, backend, *operands, *dots)
    return function.value_and_tangent(operands, dots, chosen)


def _widened(operands: Sequence[Any], x: Any) -> tuple[Any, ...]:
    """Widen y and gate, or their tangents, as autocast needs it."""
    first, y, gate = operands
    return first, widen_in_autocast(y, x), widen_in_autocast(gate, x)


def _check(operands: tuple[Any, ...]) -> None:
    """Validate what every backend takes for granted."""
    x, y, gate = operands
    check_tokens(_OP, x)
    check_update(_OP, x, y)
    check_modulation(_OP, "gate", gate, x)
