# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of adaptive layer-norm modulation."""

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_rows, dtype_name, rows


def _shape(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    n_batch, n_tokens, n_channels = x.shape
    return n_batch, n_tokens, n_channels, scale.ndim == 3


def launch_fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale = (contiguous_rows(t) for t in (x, shift, scale))
    y = torch.empty(x.shape, dtype=x.dtype)
    _ext.load().adaln_modulate_fwd_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=(dtype_name(x), dtype_name(scale)),
        x=rows(x),
        shift=rows(shift),
        scale=rows(scale),
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y


def launch_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float, needs_x: bool, needs_modulation: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dshift and dscale, None for what is not needed; the same bits on any threads."""
    dy, x, scale = (contiguous_rows(t) for t in (dy, x, scale))
    dx = torch.empty(x.shape, dtype=x.dtype) if needs_x else None
    dshift, dscale = (
        torch.empty(scale.shape, dtype=scale.dtype) if needs_modulation else None for _ in range(2)
    )
    _ext.load().adaln_modulate_bwd_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=(dtype_name(x), dtype_name(scale)),
        dy=rows(dy),
        x=rows(x),
        scale=rows(scale),
        dx=address(dx),
        dshift=address(dshift),
        dscale=address(dscale),
        threads=torch.get_num_threads(),
    )
    return dx, dshift, dscale


def launch_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    with_value: bool,
) -> tuple[Tensor | None, Tensor]:
    """Return y (None without `with_value`) and y_dot, both [B, N, C] in the dtype of x."""
    # The list keeps copies alive while the kernel reads them.
    operands = [contiguous_rows(t) for t in primals]
    dots = [None if t is None else contiguous_rows(t) for t in tangents]
    x, _, scale = operands
    y_dot = torch.empty(x.shape, dtype=x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype) if with_value else None
    _ext.load().adaln_modulate_jvp_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=(dtype_name(x), dtype_name(scale)),
        primals=tuple(rows(t) for t in operands),
        tangents=tuple(None if t is None else rows(t) for t in dots),
        y=address(y),
        y_dot=y_dot.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y, y_dot
