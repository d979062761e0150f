# SPDX-License-Identifier: Apache-2.0
"""How kernels are told where the rows of a tensor are."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Rows = tuple[int, int, int]
"""Address, batch stride and token stride of an operand, the strides in elements."""


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous.

    Nearly every tensor has that layout already and is returned as it is. Any other, such as the
    expanded gradient that `sum().backward()` sends, is copied, since a kernel reads whole rows.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def contiguous_operands(operands: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return operands whose last dimensions are contiguous, absent ones as they are.

    The caller keeps them: a copy has to live as long as a kernel reads it.
    """
    return tuple(None if x is None else contiguous_rows(x) for x in operands)


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Return batch and token stride of [B, N, C]; of [B, C] the latter is 0, of [C] both are."""
    if tensor.ndim == 1:
        return 0, 0
    return tensor.stride(0), tensor.stride(1) if tensor.ndim == 3 else 0


def strides_of(*operands: Tensor | None) -> tuple[int, ...]:
    """Return batch and token stride of each operand in a row, zeros for an absent one."""
    return tuple(s for x in operands for s in ((0, 0) if x is None else row_strides(x)))


def rows(tensor: Tensor) -> Rows:
    """Describe [B, N, C], [B, C] or [C] for C++, which gets addresses and no tensors."""
    return tensor.data_ptr(), *row_strides(tensor)


def rows_of(operands: Sequence[Tensor | None]) -> tuple[Rows | None, ...]:
    """Describe operands for C++, None standing for an absent one."""
    return tuple(None if x is None else rows(x) for x in operands)


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's elements start, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype as C++ spells it, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def resolved(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Write out what PyTorch only marks as negated, such as `z.conj().imag`: kernels read bytes."""
    return tuple(x if x is None else x.resolve_neg() for x in tensors)
