# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of the gated residual."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows, rows_of

Operands = tuple[Tensor | None, ...]


def _call(y: Tensor, gate: Tensor) -> dict[str, Any]:
    """Return the arguments that every kernel takes."""
    return {
        "shape": tuple(y.shape),
        "dtypes": (dtype_name(y), dtype_name(gate)),
        "threads": torch.get_num_threads(),
    }


def launch_fwd(operands: Operands, options: tuple[()], keep: bool) -> tuple[Tensor]:
    """Return x + gate * y, [B, N, C] in the dtype of x."""
    given = contiguous_operands(operands)
    _, y, gate = given
    out = torch.empty(y.shape, dtype=y.dtype)
    _ext.load().gated_residual_fwd_cpu(
        **_call(y, gate), operands=rows_of(given), out=out.data_ptr()
    )
    return (out,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[()]
) -> Operands:
    """Return dy and dgate after None, which stands for dx: it is the cotangent itself.

    A gradient that is not needed is None too; the others are the same on any number of threads.
    """
    (dout,) = contiguous_operands(cotangents)
    given = contiguous_operands(saved)
    y, gate = given
    dy, dgate = (
        torch.empty(model.shape, dtype=model.dtype) if needed else None
        for model, needed in zip(given, needs[1:], strict=True)
    )
    _ext.load().gated_residual_bwd_cpu(
        **_call(y, gate),
        per_token=gate.ndim == 3,
        dout=rows(dout),
        saved=rows_of(given),
        gradients=(address(dy), address(dgate)),
    )
    return None, dy, dgate


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[()], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return the value, or None without `with_value`, and the tangent, [B, N, C] like x."""
    given, dots = contiguous_operands(primals), contiguous_operands(tangents)
    _, y, gate = given
    out_dot = torch.empty(y.shape, dtype=y.dtype)
    out = torch.empty(y.shape, dtype=y.dtype) if with_value else None
    _ext.load().gated_residual_jvp_cpu(
        **_call(y, gate),
        primals=rows_of(given),
        tangents=rows_of(dots),
        outputs=(address(out), out_dot.data_ptr()),
    )
    return None if out is None else (out,), (out_dot,)
