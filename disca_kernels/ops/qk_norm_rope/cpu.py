# SPDX-License-Identifier: Apache-2.0
"""Launchers of the C++ CPU kernels of query-key normalisation with rotary embedding."""

from typing import Any

import torch

from disca_kernels import _ext
from disca_kernels.operands import address, contiguous_operands, dtype_name, rows
from disca_kernels.ops.qk_norm_rope.streams import (
    Operands,
    Stream,
    Triple,
    empty_results,
    head_dim,
    streams,
    tangents_of_streams,
)


class _Given:
    """One stream as C++ takes it; it keeps the float32 copies of weights and tables alive."""

    def __init__(self, stream: Stream, options: tuple[Any, ...]) -> None:
        heads, interleaved, self.eps = options
        n_batch, n_tokens, _ = stream.qkv.shape
        self.qkv, self.dtype = rows(stream.qkv), dtype_name(stream.qkv)
        self._weights, self._tables = _wide(stream[1:3]), _wide(stream[3:5])
        turned = 0 if stream.cos is None else stream.cos.shape[0]
        width = head_dim(stream.qkv, heads)
        self.shape = (n_batch, n_tokens, heads, width, turned, interleaved)
        self.weights, self.tables = _addresses(self._weights), _addresses(self._tables)


def _wide(tensors: Operands) -> Operands:
    return tuple(None if x is None else x.float().contiguous() for x in tensors)


def _addresses(pair: Operands) -> tuple[int, int]:
    first, second = (address(x) for x in pair)
    return first, second


def _heads(stream: Stream, tensors: Operands) -> list[tuple[int, ...] | None]:
    """Describe this stream's tokens of [B, H, N + M, D] tensors."""
    found: list[tuple[int, ...] | None] = []
    for tensor in tensors:
        part = stream.of(tensor)
        found.append(None if part is None else (part.data_ptr(), *part.stride()[:3]))
    return found


def launch_fwd(operands: Operands, options: tuple[Any, ...], keep: bool) -> Triple:
    """Return queries, keys and values [B, H, N + M, D]."""
    results = empty_results(operands, options[0])
    for stream in streams(operands):
        _forward(stream, (None,) * 3, options, results, (None,) * 3)
    return results


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[Any, ...], with_value: bool, keep: bool
) -> tuple[Triple | None, Triple]:
    """Return queries, keys and values (None without `with_value`) and their tangents."""
    dots = empty_results(primals, options[0])
    results = empty_results(primals, options[0]) if with_value else None
    for stream, along in zip(streams(primals), tangents_of_streams(tangents), strict=False):
        _forward(stream, along, options, results or (None,) * 3, dots)
    return results, dots


def _forward(
    stream: Stream, along: Operands, options: tuple[Any, ...], results: Operands, dots: Operands
) -> None:
    """Write one stream's part of results, of tangents, or of both."""
    given, qkv_dot, weight_dots = _Given(stream, options), along[0], _wide(along[1:])
    _ext.load().qk_norm_rope_fwd_cpu(
        shape=given.shape,
        eps=given.eps,
        dtype=given.dtype,
        qkv=given.qkv,
        qkv_dot=None if qkv_dot is None else rows(qkv_dot),
        weights=given.weights,
        weight_dots=_addresses(weight_dots),
        tables=given.tables,
        values=_heads(stream, results),
        tangents=_heads(stream, dots),
        threads=torch.get_num_threads(),
    )


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Operands:
    """Return the gradients that are needed, one per operand; the same bits on any threads."""
    cotangents = contiguous_operands(cotangents)
    first, *second = streams(saved)
    gradients = _gradients(cotangents, first, needs[:3], options)
    of_context: Operands = (None,) * 3
    if second:
        of_context = _gradients(cotangents, second[0], needs[5:], options)
    return (*gradients, None, None, *of_context)


def _gradients(
    cotangents: Operands, stream: Stream, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Operands:
    """Return the gradients of one stream's qkv, q_weight and k_weight."""
    if not any(needs):
        return (None,) * 3
    given = _Given(stream, options)
    dqkv = torch.empty(stream.qkv.shape, dtype=stream.qkv.dtype) if needs[0] else None
    sums = tuple(torch.empty(given.shape[3]) if need else None for need in needs[1:])
    _ext.load().qk_norm_rope_bwd_cpu(
        shape=given.shape,
        eps=given.eps,
        dtype=given.dtype,
        cotangents=_heads(stream, cotangents),
        qkv=given.qkv,
        weights=given.weights,
        tables=given.tables,
        dqkv=None if dqkv is None else rows(dqkv),
        dweights=_addresses(sums),
        threads=torch.get_num_threads(),
    )
    of_weights = (
        None if total is None or weight is None else total.to(weight.dtype)
        for total, weight in zip(sums, stream[1:3], strict=True)
    )
    return (dqkv, *of_weights)
