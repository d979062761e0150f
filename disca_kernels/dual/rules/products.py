# SPDX-License-Identifier: Apache-2.0
"""Linear layers, matrix products, contractions and convolutions: linear in each argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import rule, spellings
from disca_kernels.dual.tensor import DualTensor, accumulate, primals_of, split, tangent


@rule(functional.linear)
def _linear(out: Tensor, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    (x, x_dot), (w, w_dot) = split(input), split(weight)
    out_dot = None if x_dot is None else functional.linear(x_dot, w)
    if w_dot is not None:
        out_dot = accumulate(out_dot, functional.linear(x, w_dot))
    return accumulate(out_dot, tangent(bias))


def _register_bilinear(name: str) -> None:
    product = getattr(torch, name)
    names = (name, "__matmul__") if name == "matmul" else (name,)

    @rule(*spellings(*names))
    def _bilinear(out: Tensor, input: Any, other: Any) -> Tensor | None:
        (x, x_dot), (y, y_dot) = split(input), split(other)
        left = None if x_dot is None else product(x_dot, y)
        return accumulate(left, None if y_dot is None else product(x, y_dot))


for _name in ("matmul", "mm", "bmm", "mv", "dot", "outer"):
    _register_bilinear(_name)


@rule(Tensor.__rmatmul__)
def _reflected_matmul(out: Tensor, input: Any, other: Any) -> Tensor | None:
    (x, x_dot), (y, y_dot) = split(other), split(input)
    left = None if x_dot is None else torch.matmul(x_dot, y)
    return accumulate(left, None if y_dot is None else torch.matmul(x, y_dot))


def _register_sum_and_product(name: str) -> None:
    combine = getattr(torch, name)

    @rule(*spellings(name))
    def _sum_and_product(
        out: Tensor, input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1
    ) -> Any:
        (x, x_dot), (y, y_dot), out_dot = split(left), split(right), tangent(input)
        out_dot = None if out_dot is None else out_dot * beta
        for first, second in ((x_dot, y), (x, y_dot)):
            if first is not None and second is not None:
                so_far = out.new_zeros(()) if out_dot is None else out_dot
                out_dot = combine(so_far, first, second, alpha=alpha)
        return out_dot


for _name in ("addmm", "baddbmm"):
    _register_sum_and_product(_name)


@rule(torch.einsum)
def _einsum(out: Tensor, equation: str, *operands: Any) -> Any:
    if not isinstance(equation, str):
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    values = primals_of(operands)
    out_dot: Tensor | None = None
    for i, operand in enumerate(operands):
        if type(operand) is DualTensor:
            replaced = (*values[:i], operand._tangent, *values[i + 1 :])
            out_dot = accumulate(out_dot, torch.einsum(equation, *replaced))
    return out_dot


def _register_convolution(convolve: Callable[..., Tensor], spatial: int) -> None:
    @rule(convolve)
    def _convolution(
        out: Tensor, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        (x, x_dot), (w, w_dot), b_dot = split(input), split(weight), tangent(bias)
        out_dot = None if x_dot is None else convolve(x_dot, w, None, *args, **kwargs)
        if w_dot is not None:
            out_dot = accumulate(out_dot, convolve(x, w_dot, None, *args, **kwargs))
        return accumulate(out_dot, None if b_dot is None else b_dot.reshape(-1, *[1] * spatial))


for _spatial in (1, 2, 3):
    _register_convolution(getattr(torch, f"conv{_spatial}d"), _spatial)
    _register_convolution(getattr(torch, f"conv_transpose{_spatial}d"), _spatial)


@rule(functional.embedding)
def _embedding(out: Tensor, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return functional.embedding(input, tangent(weight), *args, **kwargs)
