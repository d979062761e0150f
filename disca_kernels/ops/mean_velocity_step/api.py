# SPDX-License-Identifier: Apache-2.0
"""Public `mean_velocity_step` and `mean_velocity_step_jvp`: contract, validation, backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.mean_velocity_step import function
from disca_kernels.validation import check_operands, check_tangents

_OP = "mean_velocity_step"
_NAMES = ("x", "u", "t", "r")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TIMES = (torch.float32, torch.float64)


def mean_velocity_step(
    x: Tensor, u: Tensor, t: Tensor, r: Tensor, *, backend: str | Backend = "auto"
) -> Tensor:
    """Follow a mean velocity from time t to time r: `x_r = x - (t - r) * u`.

    The step of MeanFlow sampling (Geng et al., "Mean Flows for One-step Generative Modeling",
    arXiv 2505.13447); with an instantaneous velocity it is Euler's. `t - r` is taken in the dtype
    of the times, the rest in float32 (float64 x: in float64), rounded once, at the store.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice.

    Args:
        x: [B, ...] the sample at time t, float32, bfloat16, float16 or float64 (float64 only on
            eager).
        u: shape of x, in any of these dtypes: a half-precision network beside a float32 sample.
        t: [B], float32 or float64.
        r: [B], in the dtype of t.
        backend: "auto", "triton" or "eager"; see `disca_kernels.backend`.

    Returns:
        The sample at time r, in the shape and dtype of x, contiguous.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    operands = (x, u, t, r)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(
            mean_velocity_step, operands, *operands, backend=backend
        )
        return result
    _check_primals(*operands)
    # Times may be float64 on every backend, so they have no say in the choice.
    return function.value(operands, resolve(_OP, backend, x, u))


def mean_velocity_step_jvp(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `mean_velocity_step` and its directional derivative in one pass.

        x_r_dot = x_dot - (t - r) * u_dot - (t_dot - r_dot) * u

    The value is tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        primals: `(x, u, t, r)` as in `mean_velocity_step`.
        tangents: `(x_dot, u_dot, t_dot, r_dot)`, each of the shape and dtype of its primal; None
            stands for zero and costs nothing.
        backend: as in `mean_velocity_step`.

    Returns:
        `(x_r, x_r_dot)`, both in the shape and dtype of x.

    Raises:
        ValueError: as `mean_velocity_step`, or a tangent of another shape or device.
        TypeError: as `mean_velocity_step`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    operands, dots = check_operands(_OP, ", ".join(_NAMES), primals, tangents)
    relevant = (*operands, *dots)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            mean_velocity_step_jvp, relevant, primals, tangents, backend=backend
        )
        return pair
    _check_primals(*operands)
    check_tangents(_OP, _NAMES, operands, dots)
    chosen = resolve(_OP, backend, *operands[:2], *dots[:2])
    return function.value_and_tangent(operands, dots, chosen)


def _check_primals(x: Any, u: Any, t: Any, r: Any) -> None:
    """Validate what every backend takes for granted."""
    for name, tensor in zip(_NAMES, (x, u, t, r), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim < 1:
        raise ValueError(f"{_OP}: x must be [B, ...], got a tensor without dimensions")
    if u.shape != x.shape:
        raise ValueError(
            f"{_OP}: u must have the shape of x, {list(x.shape)}, got {list(u.shape)}; nothing is "
            "broadcast"
        )
    for name, tensor, allowed in (
        *(("x", x, _DTYPES), ("u", u, _DTYPES)),
        *(("t", t, _TIMES), ("r", r, _TIMES)),
    ):
        if tensor.dtype not in allowed:
            names = ", ".join(map(str, allowed))
            raise TypeError(f"{_OP}: {name} must be one of {names}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device}, x is on {x.device}")
    for name, time in (("t", t), ("r", r)):
        if tuple(time.shape) != (x.shape[0],):
            raise ValueError(
                f"{_OP}: {name} must be [B] = [{x.shape[0]}] for x {list(x.shape)}, "
                f"got {list(time.shape)}"
            )
    if t.dtype != r.dtype:
        raise TypeError(f"{_OP}: t and r must have one dtype, got t {t.dtype} and r {r.dtype}")
