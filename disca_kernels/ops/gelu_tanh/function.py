# SPDX-License-Identifier: Apache-2.0
"""Autograd of GELU with bias and prefix."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.gelu_tanh.reference import gelu_tanh_jvp_reference, gelu_tanh_reference

Operands = tuple[Tensor | None, ...]


class _Operation(FusedOperation):
    """The gradient of the prefix is a part of the cotangent, seen through strides."""

    def gradient(self, ctx: Any, cotangents: Operands) -> Operands:
        """Compute the gradients that are needed; that of the prefix costs nothing."""
        dx, dbias, dprefix = super().gradient(ctx, cotangents)
        if dprefix is not None and ctx.backend != Backend.EAGER:
            heads, width = ctx.options
            shape = (*dprefix.shape[:2], heads, width)
            dprefix = dprefix[..., : heads * width].view(shape).transpose(1, 2)
        return dx, dbias, dprefix


def _reference(x: Tensor, bias: Tensor | None, prefix: Tensor | None, *_: int) -> Tensor:
    return gelu_tanh_reference(x, bias, prefix)


def _jvp_reference(primals: Any, tangents: Any, *_: int) -> tuple[Tensor, Tensor]:
    return gelu_tanh_jvp_reference(primals, tangents)


def _fake(operands: Operands, options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    x, (heads, width) = operands[0], options
    assert x is not None
    shape = (*x.shape[:2], heads * width + x.shape[2])
    return [torch.empty(shape, dtype=x.dtype, device=x.device)]


_OPERATION = _Operation(
    "gelu_tanh",
    operands=("x", "bias", "prefix"),
    options="int heads, int width",  # of the prefix, 0 without one
    reference=_reference,
    jvp_reference=_jvp_reference,
    fake=_fake,
    saved=("x", "bias"),
    unbatched=("bias",),
    passthrough={"prefix": 0},
)


def _options(prefix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if prefix is None else (prefix.shape[1], prefix.shape[3])


def value(operands: Operands, backend: Backend) -> Tensor:
    """Compute y, differentiable in the modes that the backend offers; the prefix has heads."""
    (y,) = _OPERATION.value(operands, _options(operands[2]), backend)
    return y


def value_and_tangent(
    primals: Operands, tangents: Operands, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute (y, y_dot) in one pass; autograd tracks y alone."""
    (y,), (y_dot,) = _OPERATION.value_and_tangent(primals, tangents, _options(primals[2]), backend)
    return y, y_dot
