# SPDX-License-Identifier: Apache-2.0
"""Eager specification of adaptive layer-norm modulation: value, tangent and gradient."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_token(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen a modulation and give a per-sample one the token dimension that broadcasts."""
    wide = modulation.to(dtype)
    return wide.unsqueeze(1) if wide.ndim == 2 else wide


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [B, N, C] and the reciprocal standard deviations [B, N, 1]."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def adaln_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Compute `y = LN(x) * (1 + scale) + shift` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        x: [B, N, C] tokens.
        shift: [B, C] (one row per sample) or [B, N, C] (one row per token).
        scale: same shape and dtype as `shift`.
        eps: added to the variance.

    Returns:
        [B, N, C] in the dtype of `x`.
    """
    wide = compute_dtype(x.dtype)
    x_hat = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    y = x_hat * (1.0 + _per_token(scale, wide)) + _per_token(shift, wide)
    return y.to(x.dtype)


def adaln_modulate_jvp_reference(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute the value and, by the closed formula, its directional derivative.

    With `x_hat = LN(x)` and `rstd` the reciprocal standard deviation of a row,

        x_hat_dot = rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot))
        y_dot = x_hat_dot * (1 + scale) + x_hat * scale_dot + shift_dot

    Args:
        primals: `(x, shift, scale)` as in `adaln_modulate_reference`.
        tangents: `(x_dot, shift_dot, scale_dot)`, each of its primal's shape, or None for zero.
        eps: added to the variance.

    Returns:
        `(y, y_dot)`, both [B, N, C] in the dtype of `x`.
    """
    x, shift, scale = primals
    wide = compute_dtype(x.dtype)
    x_hat, rstd = _normalise(x.to(wide), eps)
    y = x_hat * (1.0 + _per_token(scale, wide)) + _per_token(shift, wide)
    return y.to(x.dtype), tangent_of_normalised(x_hat, rstd, scale, tangents).to(x.dtype)


def tangent_of_normalised(
    x_hat: Tensor,
    rstd: Tensor,
    scale: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Compute y_dot from normalised rows [B, N, C] and their `rstd` [B, N, 1], in their dtype."""
    x_dot, shift_dot, scale_dot = tangents
    wide = x_hat.dtype
    y_dot = None
    if x_dot is not None:
        wide_dot = x_dot.to(wide)
        mean_dot = wide_dot.mean(-1, keepdim=True)
        correlation = (x_hat * wide_dot).mean(-1, keepdim=True)
        x_hat_dot = rstd * (wide_dot - mean_dot - x_hat * correlation)
        y_dot = x_hat_dot * (1.0 + _per_token(scale, wide))
    if scale_dot is not None:
        term = x_hat * _per_token(scale_dot, wide)
        y_dot = term if y_dot is None else y_dot + term
    if shift_dot is not None:
        term = _per_token(shift_dot, wide).expand_as(x_hat)
        y_dot = term if y_dot is None else y_dot + term
    return torch.zeros_like(x_hat) if y_dot is None else y_dot


def adaln_modulate_vjp_reference(
    dy: Tensor, x: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `adaln_modulate` by the closed formula.

    With `g = dy * (1 + scale)`,

        dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
        dshift = dy, dscale = dy * x_hat, summed over the tokens of a per-sample modulation

    Args:
        dy: [B, N, C] gradient with respect to the value.
        x: [B, N, C] tokens.
        scale: [B, C] or [B, N, C].
        eps: added to the variance.

    Returns:
        `(dx, dshift, dscale)` in the shapes and dtypes of x, scale and scale.
    """
    wide = compute_dtype(x.dtype)
    x_hat, rstd = _normalise(x.to(wide), eps)
    wide_dy = dy.to(wide)
    g = wide_dy * (1.0 + _per_token(scale, wide))
    correlation = (g * x_hat).mean(-1, keepdim=True)
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * correlation)
    dshift, dscale = wide_dy, wide_dy * x_hat
    if scale.ndim == 2:
        dshift, dscale = dshift.sum(1), dscale.sum(1)
    return dx.to(x.dtype), dshift.to(scale.dtype), dscale.to(scale.dtype)
