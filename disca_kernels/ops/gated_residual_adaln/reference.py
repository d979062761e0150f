# SPDX-License-Identifier: Apache-2.0
"""Eager specification of the gated residual with the modulation that follows it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def gated_residual_adaln_reference(
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
) -> Pair:
    """Compute `x_new = x + gate * y` and the modulated norm h of x_new in plain PyTorch.

        h = (norm(x_new) * weight + bias) * (1 + scale) + shift

    h is that of the x_new that is returned, which is rounded to its dtype. Differentiable any
    number of times, in both modes. It computes in float32 (float64 inputs: in float64).

    Args:
        x: [B, N, C] tokens.
        y: [B, N, C] their update.
        gate: [B, C] (one row per sample) or [B, N, C] (one row per token).
        shift: [B, C] or [B, N, C].
        scale: same shape and dtype as `shift`.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        norm: "layer", or "rms" for a norm that does not subtract the mean.
        eps: added to the variance, or to the mean square.

    Returns:
        `(x_new, h)`, both [B, N, C] in the dtype of `x`.
    """
    wide = _compute_dtype(x.dtype)
    x_new = (x.to(wide) + _per_token(gate, wide) * y.to(wide)).to(x.dtype)
    if norm == "rms":
        normal = _normalise(x_new.to(wide), norm, eps)[0]
    else:
        normal = torch.nn.functional.layer_norm(x_new.to(wide), x.shape[-1:], eps=eps)
    normal = _affine(normal, weight, bias)
    h = normal * (1.0 + _per_token(scale, wide)) + _per_token(shift, wide)
    return x_new, h.to(x.dtype)


def gated_residual_adaln_jvp_reference(
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Pair, Pair]:
    """Compute the values and, by the closed formula, their directional derivatives.

    With `x_hat = norm(x_new)`, `rstd` the reciprocal deviation of a row of x_new and
    `a = x_hat * weight + bias`,

        x_new_dot = x_dot + gate * y_dot + gate_dot * y
        x_hat_dot = rstd * (x_new_dot - mean(x_new_dot) - x_hat * mean(x_hat * x_new_dot))
        a_dot = x_hat_dot * weight + x_hat * weight_dot + bias_dot
        h_dot = a_dot * (1 + scale) + a * scale_dot + shift_dot

    where an RMS norm has no `mean(x_new_dot)`. x_new_dot is rounded only where it is returned.

    Args:
        primals: `(x, y, gate, shift, scale, weight, bias)` as in `gated_residual_adaln_reference`.
        tangents: a tangent of each, of its primal's shape, or None for zero.
        norm: as in `gated_residual_adaln_reference`.
        eps: as in `gated_residual_adaln_reference`.

    Returns:
        `((x_new, h), (x_new_dot, h_dot))`, all [B, N, C] in the dtype of `x`.
    """
    x, y, gate, shift, scale, weight, bias = primals
    x_dot, y_dot, gate_dot, shift_dot, scale_dot, weight_dot, bias_dot = tangents
    wide = _compute_dtype(x.dtype)
    x_new = (x.to(wide) + _per_token(gate, wide) * y.to(wide)).to(x.dtype)
    x_new_dot = torch.zeros_like(x, dtype=wide) if x_dot is None else x_dot.to(wide)
    if y_dot is not None:
        x_new_dot = x_new_dot + _per_token(gate, wide) * y_dot.to(wide)
    if gate_dot is not None:
        x_new_dot = x_new_dot + _per_token(gate_dot, wide) * y.to(wide)
    x_hat, rstd = _normalise(x_new.to(wide), norm, eps)
    normal = _affine(x_hat, weight, bias)
    gain = 1.0 + _per_token(scale, wide)
    h_dot = _affine(_project(x_new_dot, x_hat, rstd, norm), weight, None)
    if weight_dot is not None:
        h_dot = h_dot + x_hat * weight_dot.to(wide)
    if bias_dot is not None:
        h_dot = h_dot + bias_dot.to(wide)
    h_dot = h_dot * gain
    if scale_dot is not None:
        h_dot = h_dot + normal * _per_token(scale_dot, wide)
    if shift_dot is not None:
        h_dot = h_dot + _per_token(shift_dot, wide)
    h = normal * gain + _per_token(shift, wide)
    return (x_new, h.to(x.dtype)), (x_new_dot.to(x.dtype), h_dot.to(x.dtype))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_token(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen a modulation and give a per-sample one the token dimension that broadcasts."""
    wide = modulation.to(dtype)
    return wide.unsqueeze(1) if wide.ndim == 2 else wide


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply weight and bias, in the dtype of `normal`."""
    if weight is not None:
        normal = normal * weight.to(normal.dtype)
    return normal if bias is None else normal + bias.to(normal.dtype)


def _normalise(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [B, N, C] and the reciprocal deviations [B, N, 1]."""
    centred = x if norm == "rms" else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _project(rows: Tensor, x_hat: Tensor, rstd: Tensor, norm: str) -> Tensor:
    """Apply the Jacobian of the norm, which is symmetric, to rows [B, N, C]."""
    correlation = (x_hat * rows).mean(-1, keepdim=True)
    centred = rows if norm == "rms" else rows - rows.mean(-1, keepdim=True)
    return rstd * (centred - x_hat * correlation)
