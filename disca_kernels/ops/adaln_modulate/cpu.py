# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of adaptive norm modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows, rows_of

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]


def _call(x: Tensor, scale: Tensor, weight: Tensor | None, options: Options) -> dict[str, Any]:
    """Return the arguments that every kernel takes."""
    return {
        "shape": tuple(x.shape),
        "norm": options,
        "dtypes": (dtype_name(x), dtype_name(scale), dtype_name(x if weight is None else weight)),
        "threads": torch.get_num_threads(),
    }


def launch_fwd(operands: Operands, options: Options, keep: bool) -> tuple[Tensor]:
    """Return (y,), [B, N, C] in the dtype of x."""
    given = contiguous_operands(operands)
    x, _, scale, weight, _ = given
    y = torch.empty(x.shape, dtype=x.dtype)
    _ext.load().adaln_modulate_fwd_cpu(
        **_call(x, scale, weight, options), operands=rows_of(given), y=y.data_ptr()
    )
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return a gradient for each operand, None where none is needed; the same on any threads."""
    (dy,) = contiguous_operands(cotangents)
    given = contiguous_operands(saved)
    x, scale, weight, bias = given
    gradients = tuple(
        torch.empty(model.shape, dtype=model.dtype) if needed else None
        for model, needed in zip((x, scale, scale, weight, bias), needs, strict=True)
    )
    _ext.load().adaln_modulate_bwd_cpu(
        **_call(x, scale, weight, options),
        per_token=scale.ndim == 3,
        dy=rows(dy),
        saved=rows_of(given),
        gradients=tuple(address(g) for g in gradients),
    )
    return gradients


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return (y,), or None without `with_value`, and (y_dot,), [B, N, C] in the dtype of x."""
    given, dots = contiguous_operands(primals), contiguous_operands(tangents)
    x, _, scale, weight, _ = given
    y_dot = torch.empty(x.shape, dtype=x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype) if with_value else None
    _ext.load().adaln_modulate_jvp_cpu(
        **_call(x, scale, weight, options),
        primals=rows_of(given),
        tangents=rows_of(dots),
        outputs=(address(y), y_dot.data_ptr()),
    )
    return None if y is None else (y,), (y_dot,)
