# SPDX-License-Identifier: Apache-2.0
"""Public `gelu_tanh` and `gelu_tanh_jvp`: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.activation import check_bias, check_x
from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.gelu_tanh import function
from disca_kernels.validation import check_operands, check_tangents

_OP = "gelu_tanh"
_NAMES = ("x", "bias", "prefix")


def gelu_tanh(
    x: Tensor,
    bias: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    backend: str | Backend = "auto",
) -> Tensor:
    """Compute `y = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))` with `z = x + bias`.

    The tanh form of GELU (Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415).
    With a prefix the result is `[prefix, y]` along the last dimension, written in the same pass:
    the buffer that a single-stream block multiplies by its output matrix, attention's output in
    front, without a pass that concatenates. Everything is computed in float32 (float64 inputs: in
    float64) and rounded once, when y is stored; the prefix is copied.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, N, M], float32, bfloat16, float16 or float64 (float64 only on eager).
        bias: [M] in the dtype of x or float32; None for none.
        prefix: [B, H, N, D], whose heads are joined to P = H * D, or [B, N, P]; the dtype of x;
            None for none.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        [B, N, M], with a prefix [B, N, P + M]; contiguous, in the dtype of x.

    Raises:
        ValueError: wrong rank, width, batch, number of tokens or device.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    operands = (x, bias, prefix)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(
            gelu_tanh, operands, x, bias, prefix, backend=backend
        )
        return result
    _check_primals(x, bias, prefix)
    chosen = resolve(_OP, backend, *operands)
    return function.value((x, bias, _by_heads(prefix)), chosen)


def gelu_tanh_jvp(
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `gelu_tanh` and its directional derivative in one pass.

    With `g(z) = z s(z)`, where s is the sigmoid of `sqrt(8 / pi) (z + 0.044715 z^3)`,

        y_dot = (s + z ds/dz) (x_dot + bias_dot)

    behind the tangent of the prefix. The value is tracked by autograd; the tangent is not, and
    nothing of it is kept.

    Args:
        primals: `(x, bias, prefix)` as in `gelu_tanh`; the last two may be left out.
        tangents: `(x_dot, bias_dot, prefix_dot)`, each of the shape and dtype of its primal; None
            stands for zero and costs nothing.
        backend: as in `gelu_tanh`.

    Returns:
        `(y, y_dot)`, alike, both as `gelu_tanh` returns y.

    Raises:
        ValueError: as `gelu_tanh`, or a tangent of another shape or device, or without its primal.
        TypeError: as `gelu_tanh`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    operands, dots = check_operands(_OP, ", ".join(_NAMES), primals, tangents, optional=2)
    relevant = (*operands, *dots)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            gelu_tanh_jvp, relevant, primals, tangents, backend=backend
        )
        return pair
    _check_primals(*operands)
    check_tangents(_OP, _NAMES, operands, dots)
    chosen = resolve(_OP, backend, *relevant)
    (x, bias, prefix), (x_dot, bias_dot, prefix_dot) = operands, dots
    return function.value_and_tangent(
        (x, bias, _by_heads(prefix)), (x_dot, bias_dot, _by_heads(prefix_dot)), chosen
    )


def _by_heads(prefix: Any) -> Any:
    """Take a prefix without heads for one of a single head; None stays."""
    return prefix.unsqueeze(1) if prefix is not None and prefix.ndim == 3 else prefix


def _check_primals(x: Any, bias: Any, prefix: Any) -> None:
    """Validate what every backend takes for granted."""
    check_x(_OP, x, "[B, N, M]")
    check_bias(_OP, bias, x, "[M]")
    if prefix is None:
        return
    if not isinstance(prefix, Tensor):
        raise TypeError(f"{_OP}: prefix must be a tensor or None, got {type(prefix).__name__}")
    n_batch, n_tokens, _ = x.shape
    by_heads = tuple(_by_heads(prefix).shape)
    if (
        len(by_heads) != 4
        or (by_heads[0], by_heads[2]) != (n_batch, n_tokens)
        or 0 in (by_heads[1], by_heads[3])
    ):
        raise ValueError(
            f"{_OP}: prefix must be [B, H, N, D] = [{n_batch}, H, {n_tokens}, D] or [B, N, P] = "
            f"[{n_batch}, {n_tokens}, P] for x {list(x.shape)}, got {list(prefix.shape)}"
        )
    if prefix.dtype != x.dtype:
        raise TypeError(f"{_OP}: prefix must have the dtype of x, {x.dtype}, got {prefix.dtype}")
    if prefix.device != x.device:
        raise ValueError(f"{_OP}: prefix is on {prefix.device}, x is on {x.device}")
