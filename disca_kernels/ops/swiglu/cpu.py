# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of SwiGLU."""

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.activation import widened
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows

Operands = tuple[Tensor | None, ...]


def _run(
    primals: Operands,
    tangents: Operands,
    gate_first: bool,
    outputs: tuple[Tensor | None, Tensor | None],
) -> None:
    """Compute the outputs that are there, y and y_dot."""
    x, bias = contiguous_operands(primals)
    x_dot, bias_dot = contiguous_operands(tangents)
    bias, bias_dot = widened(bias, bias_dot)
    _ext.load().swiglu_fwd_cpu(
        shape=(*x.shape[:2], x.shape[2] // 2),
        dtype=dtype_name(x),
        gate_first=gate_first,
        x=rows(x),
        x_dot=None if x_dot is None else rows(x_dot),
        biases=(address(bias), address(bias_dot)),
        outputs=(address(outputs[0]), address(outputs[1])),
        threads=torch.get_num_threads(),
    )


def _empty(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:2], x.shape[2] // 2), dtype=x.dtype)


def launch_fwd(operands: Operands, options: tuple[bool], keep: bool) -> tuple[Tensor]:
    """Return y [B, N, M] in the dtype of x; `options` are gate_first."""
    x = operands[0]
    assert x is not None
    y = _empty(x)
    _run(operands, (None, None), *options, (y, None))
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[bool]
) -> Operands:
    """Return dx and dbias, None for what is not needed; the same on any number of threads."""
    x, bias = contiguous_operands(saved)
    (dy,) = contiguous_operands(cotangents)
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    dbias = torch.empty(x.shape[-1:], dtype=torch.float32) if needs[1] else None
    (wide,) = widened(bias)
    _ext.load().swiglu_bwd_cpu(
        shape=tuple(dy.shape),
        dtype=dtype_name(x),
        gate_first=options[0],
        dy=rows(dy),
        x=rows(x),
        bias=address(wide),
        dx=address(dx),
        dbias=address(dbias),
        threads=torch.get_num_threads(),
    )
    return dx, None if dbias is None else dbias.to(bias.dtype)


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[bool], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return y (None without `with_value`) and y_dot, both [B, N, M]."""
    x = primals[0]
    assert x is not None
    y_dot = _empty(x)
    y = _empty(x) if with_value else None
    _run(primals, tangents, *options, (y, y_dot))
    return None if y is None else (y,), (y_dot,)
