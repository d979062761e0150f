# SPDX-License-Identifier: Apache-2.0
"""Eager specification of GELU with bias and prefix: value and tangent."""

import torch
import torch.nn.functional as F
from torch import Tensor


def join_heads(prefix: Tensor) -> Tensor:
    """Bring a prefix [B, H, N, D] to [B, N, H * D]; [B, N, P] is returned as it is."""
    return prefix.transpose(1, 2).flatten(2) if prefix.ndim == 4 else prefix


def gelu_tanh_reference(
    x: Tensor, bias: Tensor | None = None, prefix: Tensor | None = None
) -> Tensor:
    """Compute `gelu_tanh(x + bias)` behind a prefix in plain PyTorch.

    Differentiable any number of times, in both modes. The sum and the function are computed in
    float32 (float64 inputs: in float64) and cast once, at the end.

    Args:
        x: [B, N, M].
        bias: [M], or None for none.
        prefix: [B, H, N, D], or [B, N, P], or None for none.

    Returns:
        [B, N, M], behind a prefix [B, N, H * D + M] or [B, N, P + M], in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x if bias is None else x.to(wide) + bias.to(wide)
    y = F.gelu(z, approximate="tanh").to(x.dtype)
    return y if prefix is None else torch.cat((join_heads(prefix), y), dim=-1)


def gelu_tanh_jvp_reference(
    primals: tuple[Tensor, Tensor | None, Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Compute the value and, by the closed formula, its directional derivative.

    With `z = x + bias`, `u = sqrt(2 / pi) (z + 0.044715 z^3)` and `s = sigmoid(2 u)`,

        y = z s
        y_dot = (s + z s (1 - s) 2 du/dz) (x_dot + bias_dot)

    and the tangent of the prefix is in front.

    Args:
        primals: `(x, bias, prefix)` as in `gelu_tanh_reference`.
        tangents: `(x_dot, bias_dot, prefix_dot)`, each of its primal's shape, or None for zero.

    Returns:
        `(y, y_dot)`, alike.
    """
    x, bias, prefix = primals
    x_dot, bias_dot, prefix_dot = tangents
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    z_dot = None if x_dot is None else x_dot.to(wide)
    if bias_dot is not None:
        along = bias_dot.to(wide)
        z_dot = along.expand_as(z) if z_dot is None else z_dot + along
    if z_dot is None:
        y_dot = torch.zeros_like(x)
    else:
        # PyTorch's kernel of the gradient: the slope times what stands for the cotangent.
        y_dot = torch.ops.aten.gelu_backward(z_dot, z, approximate="tanh").to(x.dtype)
    if prefix is not None:
        front = torch.zeros_like(prefix) if prefix_dot is None else prefix_dot
        y_dot = torch.cat((join_heads(front), y_dot), dim=-1)
    return gelu_tanh_reference(x, bias, prefix), y_dot
