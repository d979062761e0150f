# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of cache_read."""

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_rows, dtype_name, rows
from disca_kernels.ops.cache_read.gradient import launch_bwd

__all__ = ["launch_bwd", "launch_fwd", "launch_jvp"]

Operands = tuple[Tensor | None, ...]


def _weight(weight: Tensor | None) -> tuple[int, int]:
    return (0, 0) if weight is None else (weight.data_ptr(), weight.stride(0))


def _run(primals: Operands, tangents: Operands, results: Operands) -> None:
    """Compute the results that are there: y, z and y_dot."""
    current, cache, weight, bias = _prepared(primals)
    current_dot, cache_dot, weight_dot, bias_dot = _prepared(tangents)
    assert current is not None
    assert cache is not None
    assert weight is not None
    _ext.load().cache_read_cpu(
        shape=(*current.shape, weight.shape[0]),
        dtype=dtype_name(current),
        tokens=(rows(current), rows(cache)),
        tokens_dot=(
            None if current_dot is None else rows(current_dot),
            None if cache_dot is None else rows(cache_dot),
        ),
        weights=(_weight(weight), _weight(weight_dot)),
        biases=(address(bias), address(bias_dot)),
        outputs=tuple(map(address, results)),
        threads=torch.get_num_threads(),
    )


def _prepared(operands: Operands) -> list[Tensor | None]:
    """Return operands with contiguous rows, a bias in float32."""
    *matrices, bias = operands
    return [
        *(None if x is None else contiguous_rows(x) for x in matrices),
        None if bias is None else bias.float().contiguous(),
    ]


def _results(primals: Operands, keep: bool) -> tuple[Tensor, Tensor]:
    """Make room for y and, if it is to be kept, for z."""
    current, _, weight, _ = primals
    assert current is not None
    assert weight is not None
    shape = (*current.shape[:2], weight.shape[0])
    y = torch.empty(shape, dtype=current.dtype)
    return y, torch.empty(shape if keep else 0, dtype=current.dtype)


def launch_fwd(
    operands: Operands, options: tuple[object, ...], keep: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, N, O] and z, the argument of SiLU, which is empty unless `keep`."""
    y, z = _results(operands, keep)
    _run(operands, (None,) * 4, (y, z if keep else None, None))
    return y, z


def launch_jvp(
    primals: Operands,
    tangents: Operands,
    options: tuple[object, ...],
    with_value: bool,
    keep: bool,
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor]]:
    """Return y and z, as `launch_fwd` (None without `with_value`), and y_dot [B, N, O]."""
    y_dot, z = _results(primals, keep and with_value)
    y = torch.empty_like(y_dot) if with_value else None
    _run(primals, tangents, (y, z if keep and with_value else None, y_dot))
    return None if y is None else (y, z), (y_dot,)
