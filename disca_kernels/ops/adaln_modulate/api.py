# SPDX-License-Identifier: Apache-2.0
"""Public `adaln_modulate` and `adaln_modulate_jvp`: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, BackendError, limit, resolve
from disca_kernels.modulation import (
    check_affine,
    check_alike,
    check_modulation,
    check_norm,
    check_tokens,
    widen_in_autocast,
    width_reasons,
)
from disca_kernels.ops.adaln_modulate import function
from disca_kernels.validation import check_eps, check_operands, check_tangents

_OP = "adaln_modulate"


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> Tensor:
    """Normalise tokens and modulate them: `y = (norm(x) * weight + bias) * (1 + scale) + shift`.

    The layer norm subtracts the mean over the last dimension and divides by the square root of the
    biased variance plus `eps`; the RMS norm (Zhang and Sennrich, arXiv 1910.07467) divides by the
    square root of the mean square plus `eps`. This is the modulation of a diffusion transformer's
    adaLN block (Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748).
    Everything is computed in float32 (float64 inputs: in float64) and rounded once, when y is
    stored.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, C] tokens, float32, bfloat16, float16 or float64 (float64 only on eager).
        shift: [B, C] for one row per sample, or [B, N, C] for one row per token; the dtype of x
            or float32; under `torch.autocast` any half precision, which is widened if x is float32.
            Nothing is broadcast: [B, 1, C] is accepted only if N is 1.
        scale: shape and dtype of `shift`.
        weight: [C], the norm's own weight, in the dtype of x or float32; None for ones.
        bias: [C] in the dtype of `weight`; None for zeros. It needs a weight and a layer norm.
        norm: "layer" or "rms".
        eps: added to the variance, or to the mean square.
        backend: "auto", "triton", "cuda", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        y [B, N, C], contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank, width, batch, device or norm.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    given = (x, shift, scale, weight, bias)
    if has_torch_function(given):
        result: Tensor = handle_torch_function(
            adaln_modulate, given, *given, norm=norm, eps=eps, backend=backend
        )
        return result
    operands = _widened(given, x)
    _check(operands, norm, eps)
    chosen = _resolve(norm, backend, operands)
    return function.value(operands, (eps, norm == "rms"), chosen)


def adaln_modulate_jvp(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `adaln_modulate` and its directional derivative in one pass.

    With `x_hat = norm(x)`, `rstd` the reciprocal deviation of a row, `a = x_hat * weight + bias`,

        x_hat_dot = rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot))
        a_dot = x_hat_dot * weight + x_hat * weight_dot + bias_dot
        y_dot = a_dot * (1 + scale) + a * scale_dot + shift_dot

    where an RMS norm has no `mean(x_dot)`. The value is tracked by autograd; the tangent is not,
    and nothing of it is kept.

    Args:
        primals: `(x, shift, scale)`, or with `weight` and `bias` after them.
        tangents: a tangent of each primal, of its shape and dtype; None stands for zero and costs
            nothing. Those of weight and bias may be left out.
        norm: as in `adaln_modulate`.
        eps: as in `adaln_modulate`.
        backend: as in `adaln_modulate`.

    Returns:
        `(y, y_dot)`, both [B, N, C] in the dtype of x.

    Raises:
        ValueError: as `adaln_modulate`, or a tangent of another shape or device.
        TypeError: as `adaln_modulate`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    names = ", ".join(function.OPERANDS)
    first, second = check_operands(_OP, names, primals, tangents, optional=2)
    relevant = (*first, *second)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            adaln_modulate_jvp, relevant, primals, tangents, norm=norm, eps=eps, backend=backend
        )
        return pair
    operands, dots = _widened(first, first[0]), _widened(second, first[0])
    _check(operands, norm, eps)
    check_tangents(_OP, function.OPERANDS, operands, dots)
    chosen = _resolve(norm, backend, (*operands, *dots))
    return function.value_and_tangent(operands, dots, (eps, norm == "rms"), chosen)


def _widened(operands: Sequence[Any], x: Any) -> tuple[Any, ...]:
    """Widen shift and scale, or their tangents, as autocast needs it."""
    first, shift, scale, *rest = operands
    return first, widen_in_autocast(shift, x), widen_in_autocast(scale, x), *rest


def _check(operands: tuple[Any, ...], norm: Any, eps: Any) -> None:
    """Validate what every backend takes for granted."""
    x, shift, scale, weight, bias = operands
    check_norm(_OP, norm)
    check_eps(_OP, eps)
    check_tokens(_OP, x)
    check_modulation(_OP, "shift", shift, x)
    check_modulation(_OP, "scale", scale, x)
    check_alike(_OP, shift, scale)
    check_affine(_OP, weight, bias, x, norm)


def _resolve(norm: str, backend: str | Backend, tensors: tuple[Tensor | None, ...]) -> Backend:
    """Choose the backend; the CUDA C++ kernels know the layer norm alone."""
    chosen = resolve(_OP, backend, *tensors)
    if chosen is Backend.CUDA and norm != "layer":
        raise BackendError(
            f"{_OP}: backend='cuda' was requested and cannot run: its kernels have no "
            f"norm={norm!r}. Would work: 'triton', 'eager', or norm='layer'."
        )
    return chosen


limit(_OP, Backend.TRITON)(width_reasons)


@limit(_OP, Backend.CUDA)
def _cuda_limit(x: Tensor, *others: Tensor | None) -> list[str]:
    """Add to the width what the CUDA C++ kernels cannot do."""
    affine = any(t is not None for t in others[2:4])
    return width_reasons(x) + ["its kernels have no weight and bias"] * affine
