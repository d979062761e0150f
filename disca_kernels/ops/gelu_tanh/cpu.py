# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of GELU with bias and prefix."""

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.activation import widened
from disca_kernels.operands import address, contiguous_operands, contiguous_rows, dtype_name, rows

Operands = tuple[Tensor | None, ...]


def _heads(prefix: Tensor | None) -> tuple[int, ...] | None:
    return None if prefix is None else (prefix.data_ptr(), *prefix.stride()[:3])


def _run(
    primals: Operands,
    tangents: Operands,
    heads: tuple[int, int],
    outputs: tuple[Tensor | None, Tensor | None],
) -> None:
    """Compute the outputs that are there, y and y_dot."""
    x, bias, prefix = contiguous_operands(primals)
    x_dot, bias_dot, prefix_dot = contiguous_operands(tangents)
    bias, bias_dot = widened(bias, bias_dot)
    _ext.load().gelu_tanh_fwd_cpu(
        shape=tuple(x.shape),
        dtype=dtype_name(x),
        x=rows(x),
        x_dot=None if x_dot is None else rows(x_dot),
        biases=(address(bias), address(bias_dot)),
        heads=heads,
        prefixes=(_heads(prefix), _heads(prefix_dot)),
        outputs=(address(outputs[0]), address(outputs[1])),
        threads=torch.get_num_threads(),
    )


def _empty(x: Tensor, heads: tuple[int, int]) -> Tensor:
    return torch.empty((*x.shape[:2], heads[0] * heads[1] + x.shape[2]), dtype=x.dtype)


def launch_fwd(operands: Operands, options: tuple[int, int], keep: bool) -> tuple[Tensor]:
    """Return y [B, N, P + M]; `options` are heads and head width of the prefix."""
    x = operands[0]
    assert x is not None
    y = _empty(x, options)
    _run(operands, (None, None, None), options, (y, None))
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[int, int]
) -> Operands:
    """Return dx and dbias, None for what is not needed; the same on any number of threads."""
    x, bias = contiguous_operands(saved)
    (dy,) = cotangents
    assert dy is not None
    dy = contiguous_rows(dy[..., options[0] * options[1] :])
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    dbias = torch.empty(x.shape[-1:], dtype=torch.float32) if needs[1] else None
    (wide,) = widened(bias)
    _ext.load().gelu_tanh_bwd_cpu(
        shape=tuple(x.shape),
        dtype=dtype_name(x),
        dy=rows(dy),
        x=rows(x),
        bias=address(wide),
        dx=address(dx),
        dbias=address(dbias),
        threads=torch.get_num_threads(),
    )
    return dx, None if dbias is None else dbias.to(bias.dtype), None


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[int, int], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return y (None without `with_value`) and y_dot, both [B, N, P + M]."""
    x = primals[0]
    assert x is not None
    y_dot = _empty(x, options)
    y = _empty(x, options) if with_value else None
    _run(primals, tangents, options, (y, y_dot))
    return None if y is None else (y,), (y_dot,)
