# SPDX-License-Identifier: Apache-2.0
"""Launchers of the CUDA C++ kernels of adaptive layer-norm modulation."""

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_rows, dtype_name, rows

# Blocks that sum the gradients of per-sample modulations; a constant, so that the order of
# summation is the same on every device.
_MODULATION_BLOCKS = 512


def _shape(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    n_batch, n_tokens, n_channels = x.shape
    return n_batch, n_tokens, n_channels, scale.ndim == 3


def _stream(x: Tensor) -> int:
    stream: int = torch.cuda.current_stream(x.device).cuda_stream
    return stream


def launch_fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale = (contiguous_rows(t) for t in (x, shift, scale))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_fwd_cuda(
            shape=_shape(x, scale),
            eps=eps,
            dtypes=(dtype_name(x), dtype_name(scale)),
            x=rows(x),
            shift=rows(shift),
            scale=rows(scale),
            y=y.data_ptr(),
            stream=_stream(x),
        )
    return y


def launch_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float, needs_x: bool, needs_modulation: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dshift and dscale, None for what is not needed; sums in a fixed order."""
    dy, x, scale = (contiguous_rows(t) for t in (dy, x, scale))
    n_batch, n_tokens, n_channels = x.shape
    per_token = scale.ndim == 3
    rows_per_split = max(1, -(-n_batch * n_tokens // _MODULATION_BLOCKS))
    n_splits = -(-n_tokens // rows_per_split)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    dshift = dscale = None
    if needs_modulation:
        shape = x.shape if per_token else (n_batch, n_splits, n_channels)
        dtype = scale.dtype if per_token else torch.float32
        dshift, dscale = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_bwd_cuda(
            shape=_shape(x, scale),
            eps=eps,
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
    return dx, dshift, dscale


def launch_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    with_value: bool,
) -> tuple[Tensor | None, Tensor]:
    """Return y (None without `with_value`) and y_dot, both [B, N, C] in the dtype of x."""
    # The lists keep copies alive until the kernel has been enqueued.
    operands = [contiguous_rows(t) for t in primals]
    dots = [None if t is None else contiguous_rows(t) for t in tangents]
    x, _, scale = operands
    y_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    with torch.cuda.device(x.device):
        _ext.load().adaln_modulate_jvp_cuda(
            shape=_shape(x, scale),
            eps=eps,
            dtypes=(dtype_name(x), dtype_name(scale)),
            primals=tuple(rows(t) for t in operands),
            tangents=tuple(None if t is None else rows(t) for t in dots),
            y=address(y),
            y_dot=y_dot.data_ptr(),
            stream=_stream(x),
        )
    return y, y_dot
