# SPDX-License-Identifier: Apache-2.0
"""Functions of one tensor, element by element.

Such a function has a diagonal Jacobian, so PyTorch's fused backward kernels, which multiply by
the derivative, give the tangent in one pass as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import rule, spellings
from disca_kernels.dual.tensor import split

_aten = torch.ops.aten

#: name -> derivative(out, x, x_dot)
_ANALYTIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "exp": lambda out, x, x_dot: x_dot * out,
    "expm1": lambda out, x, x_dot: torch.addcmul(x_dot, x_dot, out),
    "log": lambda out, x, x_dot: x_dot / x,
    "log1p": lambda out, x, x_dot: x_dot / (x + 1),
    "sin": lambda out, x, x_dot: x_dot * x.cos(),
    "cos": lambda out, x, x_dot: (x_dot * x.sin()).neg_(),
    "sqrt": lambda out, x, x_dot: (x_dot / out).mul_(0.5),
    "rsqrt": lambda out, x, x_dot: (x_dot / x).mul_(out).mul_(-0.5),
    "reciprocal": lambda out, x, x_dot: (x_dot * out).mul_(out).neg_(),
    "square": lambda out, x, x_dot: (x_dot * x).mul_(2),
}


def _register_analytic(name: str, derivative: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    @rule(*spellings(name))
    def _analytic(out: Tensor, input: Any) -> Tensor:
        return derivative(out, *split(input))


for _name, _derivative in _ANALYTIC.items():
    _register_analytic(_name, _derivative)


@rule(*spellings("sigmoid"))
def _sigmoid(out: Tensor, input: Any) -> Any:
    _, x_dot = split(input)
    return NotImplemented if out.is_complex() else _aten.sigmoid_backward.default(x_dot, out)


@rule(*spellings("tanh"))
def _tanh(out: Tensor, input: Any) -> Any:
    _, x_dot = split(input)
    return NotImplemented if out.is_complex() else _aten.tanh_backward.default(x_dot, out)


@rule(*spellings("relu"))
def _relu(out: Tensor, input: Any, inplace: bool = False) -> Tensor:
    result: Tensor = _aten.threshold_backward.default(split(input)[1], out, 0)
    return result


@rule(*spellings("silu"))
def _silu(out: Tensor, input: Any, inplace: bool = False) -> Any:
    x, x_dot = split(input)
    return NotImplemented if out.is_complex() else _aten.silu_backward.default(x_dot, x)


@rule(*spellings("gelu"))
def _gelu(out: Tensor, input: Any, approximate: str = "none") -> Tensor:
    x, x_dot = split(input)
    result: Tensor = _aten.gelu_backward.default(x_dot, x, approximate=approximate)
    return result


@rule(*spellings("softplus"))
def _softplus(out: Tensor, input: Any, beta: float = 1, threshold: float = 20) -> Tensor:
    x, x_dot = split(input)
    result: Tensor = _aten.softplus_backward.default(x_dot, x, beta, threshold)
    return result


@rule(*spellings("abs", "absolute"))
def _abs(out: Tensor, input: Any) -> Any:
    x, x_dot = split(input)
    return NotImplemented if x.is_complex() else x_dot * x.sgn()


@rule(*spellings("clamp", "clip", "clamp_min", "clamp_max"))
def _clamp(out: Tensor, input: Any, *bounds: Any, **named_bounds: Any) -> Any:
    x, x_dot = split(input)
    if any(isinstance(bound, Tensor) for bound in (*bounds, *named_bounds.values())):
        return NotImplemented
    return torch.where(out == x, x_dot, 0)


@rule(functional.dropout, torch.dropout, fused=True)
def _dropout(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **named: Any
) -> Any:
    x, x_dot = split(input)
    training = named.get("train", training)
    if not training or p in (0, 1):  # nothing is drawn
        with torch.no_grad():
            out_dot = functional.dropout(x_dot, p, training)
        return functional.dropout(x, p, training), out_dot
    if x.is_cuda:
        out, mask = torch.native_dropout(x, p, True)
        factor = mask * (1 / (1 - p))
    else:
        # Dropping out ones draws the same numbers and keeps the same tensor as dropping out x.
        factor = functional.dropout(torch.ones_like(x, requires_grad=False), p, True)
        out = x * factor
    with torch.no_grad():
        return out, x_dot * factor
