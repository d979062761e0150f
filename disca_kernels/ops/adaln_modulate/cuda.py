# SPDX-License-Identifier: Apache-2.0
"""Launchers of the CUDA C++ kernels of adaptive layer-norm modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows

# Blocks that sum the gradients of per-sample modulations; a constant, so that the order of
# summation is the same on every device.
_MODULATION_BLOCKS = 512


Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]


def _plain(operands: Operands) -> tuple[Any, ...]:
    """Return the operands but for weight and bias, which are always absent here."""
    return contiguous_operands(operands[:-2])


def _shape(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    n_batch, n_tokens, n_channels = x.shape
    return n_batch, n_tokens, n_channels, scale.ndim == 3


def _stream(x: Tensor) -> int:
    stream: int = torch.cuda.current_stream(x.device).cuda_stream
    return stream


def launch_fwd(operands: Operands, options: Options, keep: bool) -> tuple[Tensor]:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale = _plain(operands)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_fwd_cuda(
            shape=_shape(x, scale),
            eps=options[0],
            dtypes=(dtype_name(x), dtype_name(scale)),
            x=rows(x),
            shift=rows(shift),
            scale=rows(scale),
            y=y.data_ptr(),
            stream=_stream(x),
        )
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return a gradient for each operand, None where none is needed; sums in a fixed order."""
    (dy,) = contiguous_operands(cotangents)
    x, scale = _plain(saved)
    n_batch, n_tokens, n_channels = x.shape
    per_token = scale.ndim == 3
    rows_per_split = max(1, -(-n_batch * n_tokens // _MODULATION_BLOCKS))
    n_splits = -(-n_tokens // rows_per_split)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    dshift = dscale = None
    if needs[1] or needs[2]:
        shape = x.shape if per_token else (n_batch, n_splits, n_channels)
        dtype = scale.dtype if per_token else torch.float32
        dshift, dscale = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_bwd_cuda(
            shape=_shape(x, scale),
            eps=options[0],
            dtypes=(dtype_name(x), dtype_name(scale)),
            dy=rows(dy),
            x=rows(x),
            scale=rows(scale),
            dx=address(dx),
            dshift=address(dshift),
            dscale=address(dscale),
            rows_per_split=rows_per_split,
            stream=_stream(x),
        )
    if dshift is not None and dscale is not None and not per_token:
        dshift, dscale = (partial.sum(1).to(scale.dtype) for partial in (dshift, dscale))
    return dx, dshift, dscale, None, None


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return (y,), or None without `with_value`, and (y_dot,), [B, N, C] in the dtype of x."""
    operands = _plain(primals)
    dots = _plain(tangents)
    x, _, scale = operands
    y_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_jvp_cuda(
            shape=_shape(x, scale),
            eps=options[0],
            dtypes=(dtype_name(x), dtype_name(scale)),
            primals=tuple(rows(t) for t in operands),
            tangents=tuple(None if t is None else rows(t) for t in dots),
            y=address(y),
            y_dot=y_dot.data_ptr(),
            stream=_stream(x),
        )
    return None if y is None else (y,), (y_dot,)
