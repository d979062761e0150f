# SPDX-License-Identifier: Apache-2.0
"""The operands of one call as one or two streams of tokens, each of which is one launch."""

from typing import NamedTuple

import torch
from torch import Tensor

from disca_kernels.operands import contiguous_operands

Operands = tuple[Tensor | None, ...]
Triple = tuple[Tensor, Tensor, Tensor]


class Stream(NamedTuple):
    """Operands of one stream, and where its tokens are in the results.

    Attributes:
        qkv: [B, N, 3 * H * D].
        q_weight: [D] or None.
        k_weight: [D] or None.
        cos: [rope_tokens, D / 2] or None.
        sin: likewise.
        tokens: of the results [B, H, N + M, D], those of this stream.
    """

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    tokens: slice

    def of(self, x: Tensor | None) -> Tensor | None:
        """Return this stream's tokens of [B, H, N + M, D]."""
        return None if x is None else x[:, :, self.tokens]


def streams(operands: Operands) -> list[Stream]:
    """Return the streams of a call, their last dimensions contiguous."""
    qkv, q_weight, k_weight, cos, sin, *context = contiguous_operands(operands)
    context_qkv, context_q_weight, context_k_weight = context
    assert qkv is not None
    n_tokens = qkv.shape[1]
    found = [Stream(qkv, q_weight, k_weight, cos, sin, slice(0, n_tokens))]
    if context_qkv is not None:
        tokens = slice(n_tokens, n_tokens + context_qkv.shape[1])
        found.append(Stream(context_qkv, context_q_weight, context_k_weight, None, None, tokens))
    return found


def tangents_of_streams(tangents: Operands) -> list[Operands]:
    """Return the tangents of qkv, q_weight and k_weight of each stream, the context's last."""
    rows = contiguous_operands(tangents)
    return [rows[:3], rows[5:]]


def head_dim(qkv: Tensor, heads: int) -> int:
    """Return D of a packed projection [B, N, 3 * H * D]."""
    return int(qkv.shape[-1]) // (3 * heads)


def empty_results(operands: Operands, heads: int) -> Triple:
    """Allocate queries, keys and values [B, H, N + M, D]."""
    qkv, context_qkv = operands[0], operands[5]
    assert qkv is not None
    n_tokens = qkv.shape[1] + (0 if context_qkv is None else context_qkv.shape[1])
    shape = (qkv.shape[0], heads, n_tokens, head_dim(qkv, heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    return q, k, v
