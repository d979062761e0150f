# SPDX-License-Identifier: Apache-2.0
"""Public `swiglu` and `swiglu_jvp`: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.activation import check_bias, check_x
from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.swiglu import function
from disca_kernels.validation import check_operands, check_tangents

_OP = "swiglu"
_NAMES = ("x", "bias")


def swiglu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    gate_first: bool = True,
    backend: str | Backend = "auto",
) -> Tensor:
    """Compute `y = silu(gate) * up` where `[gate, up] = x + bias` and `silu(z) = z sigmoid(z)`.

    The gated activation of a feed-forward layer (Shazeer, "GLU Variants Improve Transformer",
    arXiv 2002.05202), of gate and up projections in one packed tensor. Everything is computed in
    float32 (float64 inputs: in float64) and rounded once, when y is stored.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, 2M], float32, bfloat16, float16 or float64 (float64 only on eager).
        bias: [2M] in the dtype of x or float32; None for none.
        gate_first: whether the gate is the first half of the last dimension; diffusers'
            `SwiGLU` has it second.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        y [B, N, M], contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank or device, or an odd width.
        TypeError: wrong dtype, or not a tensor; gate_first is not a bool.
        BackendError: the backend that was asked for cannot run this call.
    """
    if has_torch_function((x, bias)):
        result: Tensor = handle_torch_function(
            swiglu, (x, bias), x, bias, gate_first=gate_first, backend=backend
        )
        return result
    _check(x, bias, gate_first)
    return function.value((x, bias), gate_first, resolve(_OP, backend, x, bias))


def swiglu_jvp(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    *,
    gate_first: bool = True,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `swiglu` and its directional derivative in one pass.

    With s the sigmoid of the gate and `[gate_dot, up_dot] = x_dot + bias_dot`,

        y_dot = (s + gate s (1 - s)) up gate_dot + gate s up_dot

    The value is tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        primals: `(x, bias)` as in `swiglu`; the bias may be left out.
        tangents: `(x_dot, bias_dot)`, each of the shape and dtype of its primal; None stands for
            zero and costs nothing.
        gate_first: as in `swiglu`.
        backend: as in `swiglu`.

    Returns:
        `(y, y_dot)`, both [B, N, M] in the dtype of x.

    Raises:
        ValueError: as `swiglu`, or a tangent of another shape or device, or without its primal.
        TypeError: as `swiglu`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    operands, dots = check_operands(_OP, ", ".join(_NAMES), primals, tangents, optional=1)
    relevant = (*operands, *dots)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            swiglu_jvp, relevant, primals, tangents, gate_first=gate_first, backend=backend
        )
        return pair
    given, bias = operands
    _check(given, bias, gate_first)
    check_tangents(_OP, _NAMES, operands, dots)
    return function.value_and_tangent(operands, dots, gate_first, resolve(_OP, backend, *relevant))


def _check(x: Any, bias: Any, gate_first: Any) -> None:
    """Validate what every backend takes for granted."""
    check_x(_OP, x, "[B, N, 2M]")
    if x.shape[-1] % 2:
        raise ValueError(
            f"{_OP}: x must be [B, N, 2M], gate and up side by side, got {list(x.shape)} of odd "
            "width"
        )
    check_bias(_OP, bias, x, "[2M]")
    if not isinstance(gate_first, bool):
        raise TypeError(f"{_OP}: gate_first must be a bool, got {type(gate_first).__name__}")
