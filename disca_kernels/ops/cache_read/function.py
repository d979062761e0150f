# SPDX-License-Identifier: Apache-2.0
"""Autograd of cache_read."""

import torch
from torch import Tensor

from disca_kernels.operation import FusedOperation, Options, Tensors
from disca_kernels.ops.cache_read.reference import cache_read_jvp_reference, cache_read_reference


def _fake(operands: Tensors, options: Options, keep: bool) -> list[Tensor]:
    """Return y, and z, which the gradient needs."""
    current, _, weight, _ = operands
    assert current is not None
    assert weight is not None
    y = current.new_empty((*current.shape[:2], weight.shape[0]))
    return [y, torch.empty_like(y) if keep else current.new_empty(0)]


OPERATION = FusedOperation(
    "cache_read",
    operands=("current", "cache", "weight", "bias"),
    reference=cache_read_reference,
    jvp_reference=cache_read_jvp_reference,
    fake=_fake,
    saved=("current", "cache", "weight", "bias", "result1"),
    unbatched=("weight", "bias"),
)
