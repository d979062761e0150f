# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of the gated residual with modulation."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows_of

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]
Pair = tuple[Tensor, Tensor]


def _call(
    y: Tensor, gate: Tensor, scale: Tensor, weight: Tensor | None, options: Options
) -> dict[str, Any]:
    """Return the arguments that every kernel takes."""
    like = (y, gate, scale, y if weight is None else weight)
    return {
        "shape": tuple(y.shape),
        "norm": options,
        "dtypes": tuple(dtype_name(x) for x in like),
        "threads": torch.get_num_threads(),
    }


def _empty_pair(y: Tensor) -> Pair:
    return torch.empty(y.shape, dtype=y.dtype), torch.empty(y.shape, dtype=y.dtype)


def launch_fwd(operands: Operands, options: Options, keep: bool) -> Pair:
    """Return x_new and h, [B, N, C] in the dtype of x."""
    given = contiguous_operands(operands)
    _, y, gate, _, scale, weight, _ = given
    x_new, h = _empty_pair(y)
    _ext.load().gated_residual_adaln_fwd_cpu(
        **_call(y, gate, scale, weight, options),
        operands=rows_of(given),
        outputs=(x_new.data_ptr(), h.data_ptr()),
    )
    return x_new, h


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return a gradient for each operand, None where none is needed; the same on any threads."""
    outer, given = contiguous_operands(cotangents), contiguous_operands(saved)
    x_new, y, gate, scale, weight, bias = given
    # Without a gradient of h there is none of what only h depends on.
    make = torch.empty if outer[1] is not None else torch.zeros
    gradients = [
        (torch.empty if i < 3 else make)(model.shape, dtype=model.dtype) if needed else None
        for i, (model, needed) in enumerate(
            zip((x_new, y, gate, scale, scale, weight, bias), needs, strict=True)
        )
    ]
    written = gradients if outer[1] is not None else [*gradients[:3], *(None,) * 4]
    _ext.load().gated_residual_adaln_bwd_cpu(
        **_call(y, gate, scale, weight, options),
        per_token=(gate.ndim == 3, scale.ndim == 3),
        cotangents=rows_of(outer),
        saved=rows_of(given),
        gradients=tuple(address(g) for g in written),
    )
    return tuple(gradients)


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[Pair | None, Pair]:
    """Return x_new and h, or None without `with_value`, and their tangents, [B, N, C] like x."""
    given, dots = contiguous_operands(primals), contiguous_operands(tangents)
    _, y, gate, _, scale, weight, _ = given
    pair = _empty_pair(y)
    values = _empty_pair(y) if with_value else None
    _ext.load().gated_residual_adaln_jvp_cpu(
        **_call(y, gate, scale, weight, options),
        primals=rows_of(given),
        tangents=rows_of(dots),
        outputs=tuple(address(x) for x in (*(values or (None, None)), *pair)),
    )
    return values, pair
