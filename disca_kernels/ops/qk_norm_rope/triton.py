# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels of query-key normalisation with rotary embedding.

A program owns some tokens and goes through a group of heads, so that it reads their cosines and
sines once. A head's row is D contiguous elements in the packed projection and in the results;
neighbouring programs have neighbouring heads of the same tokens.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from disca_kernels.operands import contiguous_operands
from disca_kernels.ops.qk_norm_rope.streams import (
    Operands,
    Stream,
    Triple,
    empty_results,
    head_dim,
    streams,
    tangents_of_streams,
)
from disca_kernels.ops.qk_norm_rope.triton_backward import _qk_norm_rope_bwd_kernel
from disca_kernels.ops.qk_norm_rope.triton_forward import (
    _qk_norm_rope_fwd_kernel,
    _qk_norm_rope_jvp_kernel,
)
from disca_kernels.testing.interpreter import prepare_interpreter

prepare_interpreter()

_TILE_ELEMENTS = 2048
_MAX_TOKENS_PER_TILE = 64
HEADS_PER_PROGRAM = 4
# Programs of the backward pass, which sum gradients of weights: about eight for each multiprocessor
# of the largest devices. It is a constant, not the size of this device, so that the order of
# summation is the same everywhere.
_BACKWARD_PROGRAMS = 1024


def tile(width: int, interleaved: bool) -> tuple[int, int, int]:
    """Choose BLOCK_N, BLOCK_H and warps so that threads load 16 bytes of bfloat16 at a time.

    Interleaved pairs are loaded as one tile, half-split ones as two.
    """
    block_h = max(8, triton.next_power_of_2(width) // 2)
    block_n = min(max(1, _TILE_ELEMENTS // (2 * block_h)), _MAX_TOKENS_PER_TILE)
    per_warp = 256 if interleaved else 512
    return block_n, block_h, min(max(2 * block_n * block_h // per_warp, 1), 16)


def _constants(qkv: Tensor, options: tuple[Any, ...]) -> dict[str, Any]:
    """Return the compile-time arguments of a launch."""
    heads, interleaved, _ = options
    width = head_dim(qkv, heads)
    block_n, block_h, num_warps = tile(width, interleaved)
    return {
        "D": width,
        "HEADS": HEADS_PER_PROGRAM,
        "BLOCK_N": block_n,
        "BLOCK_H": block_h,
        "INTERLEAVED": interleaved,
        "num_warps": num_warps,
    }


def _tables(stream: Stream) -> tuple[Tensor | None, Tensor | None, int]:
    """Return contiguous cosines and sines and how many tokens they turn."""
    if stream.cos is None or stream.sin is None or stream.cos.shape[0] == 0:
        return None, None, 0
    return stream.cos.contiguous(), stream.sin.contiguous(), stream.cos.shape[0]


def _programs(qkv: Tensor, heads: int, block_n: int) -> tuple[int, int]:
    """Return how many groups of heads and how many tiles of tokens there are in all samples."""
    return triton.cdiv(heads, HEADS_PER_PROGRAM), qkv.shape[0] * triton.cdiv(qkv.shape[1], block_n)


def _strides(x: Tensor | None, *dims: int) -> tuple[int, ...]:
    return tuple(0 if x is None else x.stride(d) for d in dims)


def launch_fwd(operands: Operands, options: tuple[Any, ...], keep: bool) -> Triple:
    """Return queries, keys and values [B, H, N + M, D]."""
    heads, _, eps = options
    results = empty_results(operands, heads)
    for stream in streams(operands):
        if stream.qkv.numel() == 0:
            continue
        constants = _constants(stream.qkv, options)
        groups, tiles = _programs(stream.qkv, heads, constants["BLOCK_N"])
        cos, sin, rope_tokens = _tables(stream)
        _qk_norm_rope_fwd_kernel[(groups * tiles,)](
            stream.qkv,
            stream.q_weight,
            stream.k_weight,
            cos,
            sin,
            *(stream.of(y) for y in results),
            stream.qkv.shape[1],
            heads,
            rope_tokens,
            eps,
            *_strides(stream.qkv, 0, 1),
            *_strides(results[0], 0, 1),
            **constants,
        )
    return results


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Operands:
    """Return the gradients that are needed, one per operand; sums in a fixed order."""
    cotangents = contiguous_operands(cotangents)
    first, *second = streams(saved)
    gradients = _stream_gradients(cotangents, first, needs[:3], options)
    of_context: Operands = (None,) * 3
    if second:
        of_context = _stream_gradients(cotangents, second[0], needs[5:], options)
    return (*gradients, None, None, *of_context)


def _stream_gradients(
    cotangents: Operands, stream: Stream, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Operands:
    """Return the gradients of one stream's qkv, q_weight and k_weight."""
    if not any(needs):
        return (None,) * 3
    heads, _, eps = options
    qkv, *weights = stream[:3]
    constants = _constants(qkv, options)
    groups, tasks = _programs(qkv, heads, constants["BLOCK_N"])
    per_split = max(1, triton.cdiv(tasks, max(1, _BACKWARD_PROGRAMS // groups)))
    programs = groups * triton.cdiv(tasks, per_split)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if needs[0] else None
    shape = (programs, constants["D"])
    sums = [
        torch.empty(shape, dtype=torch.float32, device=qkv.device) if need else None
        for need in needs[1:]
    ]
    if programs > 0:
        cos, sin, rope_tokens = _tables(stream)
        dys = [stream.of(x) for x in cotangents]
        _qk_norm_rope_bwd_kernel[(programs,)](
            *dys,
            qkv,
            *weights,
            cos,
            sin,
            dqkv,
            *sums,
            qkv.shape[1],
            heads,
            rope_tokens,
            eps,
            tasks,
            per_split,
            *(s for dy in dys for s in _strides(dy, 0, 1, 2)),
            *_strides(qkv, 0, 1),
            **constants,
        )
    dweights = (
        None if total is None or weight is None else total.sum(0).to(weight.dtype)
        for total, weight in zip(sums, weights, strict=True)
    )
    return (dqkv, *dweights)


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[Any, ...], with_value: bool, keep: bool
) -> tuple[Triple | None, Triple]:
    """Return queries, keys and values (None without `with_value`) and their tangents."""
    heads, _, eps = options
    dots = empty_results(primals, heads)
    results = empty_results(primals, heads) if with_value else None
    for stream, along in zip(streams(primals), tangents_of_streams(tangents), strict=False):
        if stream.qkv.numel() == 0:
            continue
        constants = _constants(stream.qkv, options)
        groups, tiles = _programs(stream.qkv, heads, constants["BLOCK_N"])
        cos, sin, rope_tokens = _tables(stream)
        _qk_norm_rope_jvp_kernel[(groups * tiles,)](
            stream.qkv,
            stream.q_weight,
            stream.k_weight,
            cos,
            sin,
            *along,
            *(stream.of(y) for y in results or (None,) * 3),
            *(stream.of(y) for y in dots),
            stream.qkv.shape[1],
            heads,
            rope_tokens,
            eps,
            *_strides(stream.qkv, 0, 1),
            *_strides(along[0], 0, 1),
            *_strides(dots[0], 0, 1),
            **constants,
        )
    return results, dots
