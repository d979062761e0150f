# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of adaptive layer-norm modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]


def _plain(operands: Operands, options: Options) -> tuple[Any, ...]:
    """Return the operands but for weight and bias, with contiguous rows."""
    *plain, weight, _ = operands
    if weight is not None or options[1]:
        raise NotImplementedError("adaln_modulate: the C++ kernels have no weight and no RMS norm")
    return contiguous_operands(plain)


def _shape(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    n_batch, n_tokens, n_channels = x.shape
    return n_batch, n_tokens, n_channels, scale.ndim == 3


def launch_fwd(operands: Operands, options: Options, keep: bool) -> tuple[Tensor]:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale = _plain(operands, options)
    y = torch.empty(x.shape, dtype=x.dtype)
    _ext.load().adaln_modulate_fwd_cpu(
        shape=_shape(x, scale),
        eps=options[0],
        dtypes=(dtype_name(x), dtype_name(scale)),
        x=rows(x),
        shift=rows(shift),
        scale=rows(scale),
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return a gradient for each operand, None where none is needed; the same on any threads."""
    (dy,) = contiguous_operands(cotangents)
    x, scale = _plain(saved, options)
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    needs_modulation = needs[1] or needs[2]
    dshift, dscale = (
        torch.empty(scale.shape, dtype=scale.dtype) if needs_modulation else None for _ in range(2)
    )
    _ext.load().adaln_modulate_bwd_cpu(
        shape=_shape(x, scale),
        eps=options[0],
        dtypes=(dtype_name(x), dtype_name(scale)),
        dy=rows(dy),
        x=rows(x),
        scale=rows(scale),
        dx=address(dx),
        dshift=address(dshift),
        dscale=address(dscale),
        threads=torch.get_num_threads(),
    )
    return dx, dshift, dscale, None, None


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return (y,), or None without `with_value`, and (y_dot,), [B, N, C] in the dtype of x."""
    operands = _plain(primals, options)
    dots = contiguous_operands(tangents[:3])
    x, _, scale = operands
    y_dot = torch.empty(x.shape, dtype=x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype) if with_value else None
    _ext.load().adaln_modulate_jvp_cpu(
        shape=_shape(x, scale),
        eps=options[0],
        dtypes=(dtype_name(x), dtype_name(scale)),
        primals=tuple(rows(t) for t in operands),
        tangents=tuple(None if t is None else rows(t) for t in dots),
        y=address(y),
        y_dot=y_dot.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return None if y is None else (y,), (y_dot,)
