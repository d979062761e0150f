# SPDX-License-Identifier: Apache-2.0
"""Count the floating-point operations of a model, whatever backend runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import disca_kernels

__all__ = ["FlopCounter", "count_flops"]


def count_flops(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of one call, two for each multiply-add.

    Counted are the matrix products: linear layers, matmul, convolutions, and attention by formula,
    ``4 * B * H * Nq * Nk * D`` (scores and weighted sum, over all keys, masked or not).
    Element-wise work (norms, activations, softmax) is left out, as is usual. Counting happens where
    a function is called, not where it is computed, so a fused kernel counts like its reference;
    ``torch.utils.flop_counter`` counts what reaches ATen and misses custom kernels.

    Args:
        call: runs the model once, for example ``lambda: host(x, t, r, cond=cond)``.

    Returns:
        The number of operations.
    """
    counter = FlopCounter()
    with torch.no_grad(), counter:
        call()
    return counter.total


class FlopCounter(TorchFunctionMode):
    """Counts what is called inside ``with``; see :func:`count_flops`.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func)
        if count is not None:
            self.total += count(out, *args, **(kwargs or {}))
        return out


def _linear(out: Tensor, *args: Tensor, **named: Tensor) -> int:
    weight = named["weight"] if "weight" in named else args[1]
    return 2 * out.numel() * weight.shape[-1]


def _matmul(out: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * out.numel() * a.shape[-1]


def _conv(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * weight[0].numel()


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Count ``q k^T`` and ``p v`` for q [B, H, Nq, D], k [B, H, Nk, D], v [B, H, Nk, Dv]."""
    scores = q.shape[:-1].numel() * k.shape[-2]
    return 2 * scores * (q.shape[-1] + v.shape[-1])


def _cache_read(
    out: Tensor, current: Tensor, cache: Tensor, weight: Tensor, *_: Any, **__: Any
) -> int:
    """Count the product of [current, cache] with the weight [O, 2C]."""
    return 2 * out.numel() * weight.shape[-1]


_COUNTS: dict[Callable[..., Any], Callable[..., int]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.scaled_dot_product_attention: _attention,
    disca_kernels.attention: _attention,
    disca_kernels.cache_read: _cache_read,
}
