# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of two tensors with broadcasting, powers, choices and reductions of two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from disca_kernels.dual.registry import rule, spellings
from disca_kernels.dual.tensor import accumulate, split, tangent


@rule(*spellings("add", "__add__", "__radd__"))
def _add(out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    x_dot, y_dot = tangent(input), tangent(other)
    if y_dot is None:
        return x_dot
    if x_dot is None:
        return y_dot if alpha == 1 else y_dot * alpha
    return torch.add(x_dot, y_dot, alpha=alpha)


@rule(*spellings("sub", "subtract", "__sub__"))
def _sub(out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    x_dot, y_dot = tangent(input), tangent(other)
    if y_dot is None:
        return x_dot
    if x_dot is None:
        return y_dot * -alpha
    return torch.sub(x_dot, y_dot, alpha=alpha)


@rule(*spellings("rsub", "__rsub__"))
def _rsub(out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _sub(out, other, input if alpha == 1 else input * alpha)


@rule(*spellings("mul", "multiply", "__mul__", "__rmul__"))
def _mul(out: Tensor, input: Any, other: Any) -> Any:
    (x, x_dot), (y, y_dot) = split(input), split(other)
    if y_dot is None:
        return x_dot * y
    if x_dot is None:
        return y_dot * x
    out_dot = x_dot * y
    # One pass less than multiplying and adding, where nothing has to be broadcast or promoted.
    if out_dot.shape == out.shape and x.dtype == y.dtype:
        return out_dot.addcmul_(x, y_dot)
    return out_dot + y_dot * x


@rule(*spellings("addcmul"))
def _addcmul(out: Tensor, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    (x, x_dot), (y, y_dot) = split(tensor1), split(tensor2)
    out_dot = tangent(input)
    for left, right in ((x_dot, y), (x, y_dot)):
        if left is not None and right is not None:
            if out_dot is None:
                out_dot = left * right if value == 1 else (left * right).mul_(value)
            else:
                out_dot = torch.addcmul(out_dot, left, right, value=value)
    return out_dot


@rule(*spellings("lerp"))
def _lerp(out: Tensor, input: Any, end: Any, weight: Any) -> Any:
    (x, x_dot), (y, y_dot), (w, w_dot) = split(input), split(end), split(weight)
    out_dot = None if x_dot is None else x_dot * (1 - w)
    out_dot = accumulate(out_dot, None if y_dot is None else y_dot * w)
    return accumulate(out_dot, None if w_dot is None else (y - x) * w_dot)


@rule(*spellings("div", "divide", "true_divide", "__truediv__", "__div__"))
def _div(out: Tensor, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    (_, x_dot), (y, y_dot) = split(input), split(other)
    if y_dot is None:
        return x_dot / y
    if x_dot is None:
        return (out * y_dot).neg_() / y
    return (x_dot - out * y_dot) / y


@rule(*spellings("__rdiv__", "__rtruediv__"))
def _rdiv(out: Tensor, input: Any, other: Any) -> Any:
    return _div(out, other, input)


@rule(*spellings("pow", "__pow__"))
def _pow(out: Tensor, input: Any, exponent: Any) -> Any:
    (x, x_dot), (y, y_dot) = split(input), split(exponent)
    if x_dot is None and not isinstance(x, Tensor) and x > 0:
        return (out * y_dot).mul_(math.log(x))
    if y_dot is not None or isinstance(y, Tensor):
        return NotImplemented
    if y == 0:
        return None
    if y == 1:
        return x_dot
    return (x_dot * x).mul_(2) if y == 2 else x.pow(y - 1).mul_(x_dot).mul_(y)


@rule(*spellings("__rpow__"))
def _rpow(out: Tensor, input: Any, other: Any) -> Any:
    return _pow(out, other, input)


@rule(torch.where)
def _where(out: Tensor, condition: Tensor, input: Any = None, other: Any = None) -> Any:
    x_dot, y_dot = tangent(input), tangent(other)
    if x_dot is None and y_dot is None:
        return None
    # A tangent that is None is the number 0, which torch.where broadcasts.
    return torch.where(condition, 0 if x_dot is None else x_dot, 0 if y_dot is None else y_dot)


@rule(Tensor.where)
def _tensor_where(out: Tensor, input: Any, condition: Tensor, other: Any = None) -> Any:
    return _where(out, condition, input, other)


@rule(*spellings("maximum", "minimum"))
def _extremum(out: Tensor, input: Any, other: Any) -> Any:
    (x, x_dot), (y, y_dot) = split(input), split(other)
    # At a tie both sides count half, as in PyTorch.
    share = (out == x).to(out.dtype).sub_((out == y).to(out.dtype)).add_(1).mul_(0.5)
    left = None if x_dot is None else x_dot * share
    return accumulate(left, None if y_dot is None else y_dot * (1 - share))


@rule(*spellings("masked_fill"))
def _masked_fill(out: Tensor, input: Any, mask: Tensor, value: Any) -> Any:
    x_dot, value_dot = tangent(input), tangent(value)
    if x_dot is None or value_dot is not None:
        return NotImplemented
    return x_dot.masked_fill(mask, 0)
