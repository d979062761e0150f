# SPDX-License-Identifier: Apache-2.0
"""Public `cache_read` and `cache_read_jvp`: contract, validation, choice of backend."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.cache_read.function import OPERATION
from disca_kernels.validation import check_operands, check_tangents

_OP = "cache_read"
_NAMES = ("current", "cache", "weight", "bias")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cache_read(
    current: Tensor,
    cache: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | Backend = "auto",
) -> Tensor:
    """Read a cache beside the current tokens: `y = SiLU([current, cache] weight^T + bias)`.

    The first layer of a learned cache predictor (DisCa, arXiv 2602.05449, section 4), without the
    tensor of 2C channels that a concatenation would write and read. Sums are in float32 (float64
    inputs: in float64) and rounded once, when y is stored.

    Differentiable in reverse mode on every backend, and in forward mode (`torch.func.jvp`,
    `forward_ad.dual_level`) with a detached tangent. With `backend="eager"` outside forward mode
    it is plain PyTorch, differentiable twice. Under `torch.autocast` all operands are cast as
    `torch.nn.functional.linear` casts its own.

    Args:
        current: [B, N, C] tokens, float32, bfloat16, float16 or float64 (float64 only on eager).
        cache: [B, N, C] tokens of an earlier step, of the same dtype.
        weight: [O, 2C], of the same dtype; its first C columns meet `current`, as in a linear
            layer of `torch.cat((current, cache), -1)`.
        bias: [O], of the same dtype, or None.
        backend: "auto", "triton", "cpu" or "eager"; see `disca_kernels.backend`.

    Returns:
        y [B, N, O], contiguous, in the dtype of `current`.

    Raises:
        ValueError: wrong rank, width or device; a cache of another batch or resolution.
        TypeError: dtypes that differ or are not supported, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    operands = (current, cache, weight, bias)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(
            cache_read, operands, current, cache, weight, bias, backend=backend
        )
        return result
    operands = _autocast(*operands)
    _check_primals(*operands)
    return OPERATION.value(operands, (), resolve(_OP, backend, *operands))[0]


def cache_read_jvp(
    primals: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `cache_read` and its directional derivative in one pass.

    With `z` the argument of SiLU and `s` its logistic function,

        z_dot = [current_dot, cache_dot] weight^T + [current, cache] weight_dot^T + bias_dot
        y_dot = s * (1 + z * (1 - s)) * z_dot

    The value is tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        primals: `(current, cache, weight, bias)` as in `cache_read`; bias may be left out.
        tangents: `(current_dot, cache_dot, weight_dot, bias_dot)`, each of the shape and dtype of
            its primal; None stands for zero, and its products are not computed. A cache is
            nearly always a constant, so that the tangent costs half of what the value does.
        backend: as in `cache_read`.

    Returns:
        `(y, y_dot)`, both [B, N, O] in the dtype of `current`.

    Raises:
        ValueError: as `cache_read`, or a tangent of another shape or device.
        TypeError: as `cache_read`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand carries a tangent of forward-mode AD itself.
    """
    primals, tangents = check_operands(_OP, ", ".join(_NAMES), primals, tangents, optional=1)
    relevant: tuple[Any, ...] = (*primals, *tangents)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            cache_read_jvp, relevant, primals, tangents, backend=backend
        )
        return pair
    primals, tangents = _autocast(*primals), _autocast(*tangents)
    _check_primals(*primals)
    check_tangents(_OP, _NAMES, primals, tangents)
    chosen = resolve(_OP, backend, *primals, *tangents)
    (y,), (y_dot,) = OPERATION.value_and_tangent(primals, tangents, (), chosen)
    return y, y_dot


def _autocast(*operands: Any) -> Any:
    """Cast as autocast does for a linear layer: floating point, except float64."""
    device = next((x.device.type for x in operands if isinstance(x, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in operands
    )


def _check_primals(current: Any, cache: Any, weight: Any, bias: Any) -> None:
    """Validate what every backend takes for granted."""
    given = dict(zip(_NAMES, (current, cache, weight, bias), strict=True))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
    if current.ndim != 3 or current.shape[-1] == 0:
        raise ValueError(
            f"{_OP}: current must be [B, N, C] with at least one channel, got {list(current.shape)}"
        )
    if cache.shape != current.shape:
        raise ValueError(
            f"{_OP}: the cache must have the shape of the current tokens; current is "
            f"{_describe(current)}, cache is {_describe(cache)}: it belongs to another batch, "
            "resolution or model"
        )
    width = 2 * current.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(
            f"{_OP}: weight must be [O, 2C] = [O, {width}] for current {_describe(current)}, got "
            f"{_describe(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_OP}: bias must be [O] = [{weight.shape[0]}] for weight {_describe(weight)}, got "
            f"{_describe(bias)}; nothing is broadcast"
        )
    if current.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{_OP}: current must be one of {names}, got {current.dtype}")
    for name, tensor in given.items():
        if tensor is None:
            continue
        both = f"current is {_describe(current)}, {name} is {_describe(tensor)}"
        if tensor.dtype != current.dtype:
            raise TypeError(f"{_OP}: {name} must have the dtype of current; {both}")
        if tensor.device != current.device:
            raise ValueError(f"{_OP}: {name} must be on the device of current; {both}")


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
