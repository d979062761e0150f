# SPDX-License-Identifier: Apache-2.0
"""Eager specification of the gated residual: value and tangent."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute `x + gate * y` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        x: [B, N, C] tokens.
        y: [B, N, C] their update.
        gate: [B, C] (one row per sample) or [B, N, C] (one row per token).

    Returns:
        [B, N, C] in the dtype of `x`.
    """
    wide = _compute_dtype(x.dtype)
    return (x.to(wide) + _per_token(gate, wide) * y.to(wide)).to(x.dtype)


def gated_residual_jvp_reference(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute the value and its directional derivative `x_dot + gate * y_dot + gate_dot * y`.

    Args:
        primals: `(x, y, gate)` as in `gated_residual_reference`.
        tangents: `(x_dot, y_dot, gate_dot)`, each of its primal's shape, or None for zero.

    Returns:
        The value and its tangent, both [B, N, C] in the dtype of `x`.
    """
    x, y, gate = primals
    x_dot, y_dot, gate_dot = tangents
    wide = _compute_dtype(x.dtype)
    dot = torch.zeros_like(x, dtype=wide) if x_dot is None else x_dot.to(wide)
    if y_dot is not None:
        dot = dot + _per_token(gate, wide) * y_dot.to(wide)
    if gate_dot is not None:
        dot = dot + _per_token(gate_dot, wide) * y.to(wide)
    return gated_residual_reference(x, y, gate), dot.to(x.dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_token(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen a modulation and give a per-sample one the token dimension that broadcasts."""
    wide = modulation.to(dtype)
    return wide.unsqueeze(1) if wide.ndim == 2 else wide
