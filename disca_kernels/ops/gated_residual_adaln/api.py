# SPDX-License-Identifier: Apache-2.0
"""Public `gated_residual_adaln` and its pair: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, limit, resolve
from disca_kernels.modulation import (
    check_affine,
    check_alike,
    check_modulation,
    check_norm,
    check_tokens,
    check_update,
    widen_in_autocast,
    width_reasons,
)
from disca_kernels.ops.gated_residual_adaln import function
from disca_kernels.validation import check_eps, check_operands, check_tangents

_OP = "gated_residual_adaln"

Pair = tuple[Tensor, Tensor]

limit(_OP, Backend.TRITON)(width_reasons)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> Pair:
    """Add a gated update to tokens and modulate their norm for the next layer, in one pass.

        x_new = x + gate * y
        h = (norm(x_new) * weight + bias) * (1 + scale) + shift

    What a diffusion transformer's block does between two layers (Peebles and Xie, "Scalable
    Diffusion Models with Transformers", arXiv 2212.09748); the norms are those of
    `adaln_modulate`. Everything is computed in float32 (float64 inputs: in float64). x_new is
    rounded once, when it is stored, and h is that of the rounded x_new.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with detached tangents. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, C] tokens, float32, bfloat16, float16 or float64 (float64 only on eager).
        y: [B, N, C] their update, in the dtype of x.
        gate: [B, C] for one row per sample, or [B, N, C] for one row per token; the dtype of x
            or float32. Nothing is broadcast: [B, 1, C] is accepted only if N is 1. Under
            `torch.autocast` y, gate, shift and scale may be of any half precision, which is
            widened if x is float32.
        shift: [B, C] or [B, N, C]; the dtype of x or float32. It need not be like `gate`.
        scale: shape and dtype of `shift`.
        weight: [C], the norm's own weight, in the dtype of x or float32; None for ones.
        bias: [C] in the dtype of `weight`; None for zeros. It needs a weight and a layer norm.
        norm: "layer" or "rms".
        eps: added to the variance, or to the mean square.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        `(x_new, h)`, both [B, N, C], contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank, width, batch, device or norm.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    given = (x, y, gate, shift, scale, weight, bias)
    if has_torch_function(given):
        result: Pair = handle_torch_function(
            gated_residual_adaln, given, *given, norm=norm, eps=eps, backend=backend
        )
        return result
    operands = _widened(given, x)
    _check(operands, norm, eps)
    chosen = resolve(_OP, backend, *operands)
    return function.value(operands, (eps, norm == "rms"), chosen)


def gated_residual_adaln_jvp(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> tuple[Pair, Pair]:
    """Compute `gated_residual_adaln` and its directional derivative in one pass.

    With `x_hat = norm(x_new)`, `rstd` the reciprocal deviation of a row of x_new and
    `a = x_hat * weight + bias`,

        x_new_dot = x_dot + gate * y_dot + gate_dot * y
        x_hat_dot = rstd * (x_new_dot - mean(x_new_dot) - x_hat * mean(x_hat * x_new_dot))
        a_dot = x_hat_dot * weight + x_hat * weight_dot + bias_dot
        h_dot = a_dot * (1 + scale) + a * scale_dot + shift_dot

    where an RMS norm has no `mean(x_new_dot)`. The values are tracked by autograd; the tangents are
    not, and nothing of them is kept.

    Args:
        primals: `(x, y, gate, shift, scale)`, or with `weight` and `bias` after them.
        tangents: a tangent of each primal, of its shape and dtype; None stands for zero and costs
            nothing. Those of weight and bias may be left out.
        norm: as in `gated_residual_adaln`.
        eps: as in `gated_residual_adaln`.
        backend: as in `gated_residual_adaln`.

    Returns:
        `((x_new, h), (x_new_dot, h_dot))`, all [B, N, C] in the dtype of x.

    Raises:
        ValueError: as `gated_residual_adaln`, or a tangent of another shape or device.
        TypeError: as `gated_residual_adaln`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    names = ", ".join(function.OPERANDS)
    first, second = check_operands(_OP, names, primals, tangents, optional=2)
    relevant = (*first, *second)
    if has_torch_function(relevant):
        pairs: tuple[Pair, Pair] = handle_torch_function(
            gated_residual_adaln_jvp,
            relevant,
            primals,
            tangents,
            norm=norm,
            eps=eps,
            backend=backend,
        )
        return pairs
    operands, dots = _widened(first, first[0]), _widened(second, first[0])
    _check(operands, norm, eps)
    check_tangents(_OP, function.OPERANDS, operands, dots)
    chosen = resolve(_OP, backend, *operands, *dots)
    return function.value_and_tangent(operands, dots, (eps, norm == "rms"), chosen)


def _widened(operands: Sequence[Any], x: Any) -> tuple[Any, ...]:
    """Widen y, gate, shift and scale, or their tangents, as autocast needs it."""
    return operands[0], *(widen_in_autocast(t, x) for t in operands[1:5]), *operands[5:]


def _check(operands: tuple[Any, ...], norm: Any, eps: Any) -> None:
    """Validate what every backend takes for granted."""
    x, y, gate, shift, scale, weight, bias = operands
    check_norm(_OP, norm)
    check_eps(_OP, eps)
    check_tokens(_OP, x)
    check_update(_OP, x, y)
    for name, modulation in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_modulation(_OP, name, modulation, x)
    check_alike(_OP, shift, scale)
    check_affine(_OP, weight, bias, x, norm)
