# SPDX-License-Identifier: Apache-2.0
"""What the kernels need to know of the operands' memory layout."""

from torch import Tensor

_MAX_ROW_STRIDE = 2**31 // 256
"""From here on an offset inside a block of 256 rows may not fit in 32 bits."""


def rows(x: Tensor) -> Tensor:
    """Return `x` with contiguous rows: a copy only if its last dimension is strided.

    Or if its rows are millions of elements apart, which the kernels' 32-bit offsets do not reach.
    """
    near = x.shape[-2] <= 1 or x.stride(-2) < _MAX_ROW_STRIDE
    return x if x.stride(-1) == 1 and near else x.contiguous()


def paired(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a primal and its tangent with the same strides, which the kernels take once.

    They nearly always agree, because the same operations made both; if not, both are copied.
    """
    if x_dot is None or x.stride() == x_dot.stride():
        return x, x_dot
    return x.contiguous(), x_dot.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """Return what a kernel addresses without strides; only `torch.vmap` makes it anything else."""
    return None if x is None else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of the first three dimensions of each tensor of [B, H, N, D]."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])
