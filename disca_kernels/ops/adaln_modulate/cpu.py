# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of adaptive layer-norm modulation."""

import torch
from torch import Tensor

from disca_kernels import _ext

_Rows = tuple[int, int, int]


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous; only another layout costs a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor) -> _Rows:
    """Describe where the rows of an operand start: address, batch stride, token stride."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1) if tensor.ndim == 3 else 0


def _shape(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    n_batch, n_tokens, n_channels = x.shape
    return n_batch, n_tokens, n_channels, scale.ndim == 3


def _dtypes(x: Tensor, scale: Tensor) -> tuple[str, str]:
    """Name the dtypes as C++ does."""
    return str(x.dtype).removeprefix("torch."), str(scale.dtype).removeprefix("torch.")


def launch_fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale = (_contiguous_rows(t) for t in (x, shift, scale))
    y = torch.empty(x.shape, dtype=x.dtype)
    _ext.load().adaln_modulate_fwd_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=_dtypes(x, scale),
        x=_rows(x),
        shift=_rows(shift),
        scale=_rows(scale),
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y


def launch_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float, needs_x: bool, needs_modulation: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dshift and dscale, None for what is not needed; the same bits on any threads."""
    dy, x, scale = (_contiguous_rows(t) for t in (dy, x, scale))
    dx = torch.empty(x.shape, dtype=x.dtype) if needs_x else None
    dshift, dscale = (
        torch.empty(scale.shape, dtype=scale.dtype) if needs_modulation else None for _ in range(2)
    )
    _ext.load().adaln_modulate_bwd_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=_dtypes(x, scale),
        dy=_rows(dy),
        x=_rows(x),
        scale=_rows(scale),
        dx=_address(dx),
        dshift=_address(dshift),
        dscale=_address(dscale),
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
    operands = [_contiguous_rows(t) for t in primals]
    dots = [None if t is None else _contiguous_rows(t) for t in tangents]
    x, _, scale = operands
    y_dot = torch.empty(x.shape, dtype=x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype) if with_value else None
    _ext.load().adaln_modulate_jvp_cpu(
        shape=_shape(x, scale),
        eps=eps,
        dtypes=_dtypes(x, scale),
        primals=tuple(_rows(t) for t in operands),
        tangents=tuple(None if t is None else _rows(t) for t in dots),
        y=_address(y),
        y_dot=y_dot.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y, y_dot
