# SPDX-License-Identifier: Apache-2.0
"""Eager specification of SwiGLU: value and tangent."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _halves(x: Tensor, bias: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Return gate and up [B, N, M] in the dtype used inside."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    first, second = z.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def swiglu_reference(x: Tensor, bias: Tensor | None = None, gate_first: bool = True) -> Tensor:
    """Compute `silu(gate) * up` of the halves of `x + bias` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        x: [B, N, 2M].
        bias: [2M], or None for none.
        gate_first: whether the gate is the first half of the last dimension.

    Returns:
        [B, N, M] in the dtype of x.
    """
    gate, up = _halves(x, bias, gate_first)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_jvp_reference(
    primals: tuple[Tensor, Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None],
    gate_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the value and, by the closed formula, its directional derivative.

    With `s = sigmoid(gate)`,

        y = gate s up
        y_dot = (s + gate s (1 - s)) up gate_dot + gate s up_dot

    where the halves of `x_dot + bias_dot` are the tangents of gate and up.

    Args:
        primals: `(x, bias)` as in `swiglu_reference`.
        tangents: `(x_dot, bias_dot)`, each of its primal's shape, or None for zero.
        gate_first: as in `swiglu_reference`.

    Returns:
        `(y, y_dot)`, both [B, N, M] in the dtype of x.
    """
    x, bias = primals
    x_dot, bias_dot = tangents
    gate, up = _halves(x, bias, gate_first)
    active = F.silu(gate)
    y = (active * up).to(x.dtype)
    if x_dot is None:
        if bias_dot is None:
            return y, torch.zeros_like(y)
        x_dot, bias_dot = bias_dot.expand_as(x), None
    gate_dot, up_dot = _halves(x_dot, bias_dot, gate_first)
    # PyTorch's kernel of the gradient: the slope times what stands for the cotangent.
    y_dot = torch.ops.aten.silu_backward(gate_dot * up, gate) + active * up_dot
    return y, y_dot.to(x.dtype)
