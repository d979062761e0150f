# SPDX-License-Identifier: Apache-2.0
"""Normalisations and softmax.

Without the affine part, the Jacobians of layer norm and of softmax are symmetric matrices, so the
backward kernel applied to a tangent instead of a gradient is the forward-mode derivative.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.fallback import tangents_by_func_jvp
from disca_kernels.dual.registry import rule, spellings
from disca_kernels.dual.tensor import split, tangent


def _affine(normal: Any, normal_dot: Any, weight: Any, bias: Any) -> Any:
    """Tangent of ``normal * weight + bias``; ``normal`` is only needed for a weight tangent."""
    (w, w_dot), (_, b_dot) = split(weight), split(bias)
    out_dot = normal_dot if normal_dot is None or w is None else normal_dot * w
    if w_dot is not None:
        scaled = normal * w_dot
        out_dot = scaled if out_dot is None else out_dot + scaled
    if b_dot is not None:
        out_dot = b_dot if out_dot is None else out_dot + b_dot
    return out_dot


def _widened(part: Any) -> Any:
    return part.float() if part is not None and part.dtype.itemsize < 4 else part


@rule(*spellings("layer_norm"), fused=True)
def _layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Any]:
    (x, x_dot), w, b = split(input), split(weight)[0], split(bias)[0]
    if torch.is_autocast_enabled(x.device.type):
        # Autocast runs functional.layer_norm in float32, but does not know the call below.
        x, w, b = _widened(x), _widened(w), _widened(b)
    shape = list(normalized_shape)
    # The call that functional.layer_norm makes; it also returns the statistics.
    out, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
    with torch.no_grad():
        normal_dot = None
        if x_dot is not None:
            normal_dot = torch.ops.aten.native_layer_norm_backward.default(
                x_dot.to(x.dtype), x, shape, mean, rstd, None, None, [True, False, False]
            )[0]
        normal = (x - mean) * rstd if split(weight)[1] is not None else None
        return out, _affine(normal, normal_dot, weight, bias)


@rule(*spellings("rms_norm"))
def _rms_norm(
    out: Tensor, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    x, x_dot = split(input)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    dims = tuple(range(-len(normalized_shape), 0))
    epsilon = torch.finfo(wide.dtype).eps if eps is None else eps
    norm = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
    rstd = norm.square_().div_(math.prod(normalized_shape)).add_(epsilon).rsqrt_()
    normal_dot = None
    if x_dot is not None:
        along = (wide * x_dot).mean(dims, keepdim=True).mul_(rstd).mul_(rstd)
        normal_dot = torch.addcmul(x_dot.to(wide.dtype), wide, along, value=-1).mul_(rstd)
    return _affine(None if tangent(weight) is None else wide * rstd, normal_dot, weight, None)


def _register_running(func: Callable[..., Tensor], live: str) -> None:
    signature = inspect.signature(func)

    @rule(func)
    def _running(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments[live]:
            # The value has updated the running statistics; they do not shape it.
            bound.arguments |= {"running_mean": None, "running_var": None}
        return tangents_by_func_jvp(func, bound.args, bound.kwargs)[0]


_register_running(functional.batch_norm, "training")
_register_running(functional.instance_norm, "use_input_stats")


@rule(*spellings("softmax"))
def _softmax(out: Tensor, input: Any, dim: int | None = None, *_: Any, **__: Any) -> Any:
    if dim is None:
        return NotImplemented
    x_dot = split(input)[1].to(out.dtype)
    return torch._softmax_backward_data(x_dot, out, dim, out.dtype)


@rule(*spellings("log_softmax"))
def _log_softmax(out: Tensor, input: Any, dim: int | None = None, *_: Any, **__: Any) -> Any:
    if dim is None:
        return NotImplemented
    x_dot = split(input)[1].to(out.dtype)
    return x_dot - (out.exp() * x_dot).sum(dim, keepdim=True)
