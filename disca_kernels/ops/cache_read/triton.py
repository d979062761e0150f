# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of cache_read, and their launchers.

A matrix product whose first operand is in two places: a program adds the products of `current` with
one half of the weight and of `cache` with the other to one accumulator, then applies bias and SiLU
before it stores. The tangent has an accumulator of its own and shares every tile that is loaded.

An operand comes in one of two forms. With TMA it is a tensor descriptor, tokens [B, N, C] in blocks
of [1, BLOCK_M, BLOCK_K] and the weight as [2, O, C] in blocks of [1, BLOCK_N, BLOCK_K], so that the
hardware reads 0 beyond the channels of either half. Otherwise it is a pointer with strides.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from disca_kernels.operands import contiguous_rows, row_strides
from disca_kernels.ops.cache_read.gradient import launch_bwd
from disca_kernels.ops.cache_read.tiles import GROUP_M, Tile, tiles_for
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.descriptors import (
    capability,
    descriptor_strides,
    has_descriptors,
)

__all__ = ["launch_bwd", "launch_fwd", "launch_jvp"]

prepare_interpreter()


@triton.jit
def _place(n_batch, N, n_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return this program's sample, first token and first output: groups of GROUP_M token tiles."""
    per_sample = tl.cdiv(N, BLOCK_M)
    tiles_m, tiles_n = n_batch * per_sample, tl.cdiv(n_out, BLOCK_N)
    i_group = tl.program_id(0) // (GROUP_M * tiles_n)
    first = i_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    rest = tl.program_id(0) % (GROUP_M * tiles_n)
    i_m = first + rest % height
    return i_m // per_sample, i_m % per_sample * BLOCK_M, rest // height * BLOCK_N


@triton.jit
def _load(
    x, i_outer, first, i_k, stride_outer, stride_row, n_rows, C,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Read x[i_outer, first : first + ROWS, i_k : i_k + BLOCK_K], 0 outside: [ROWS, BLOCK_K]."""
    if TMA:
        b = x.load([i_outer, first, i_k]).reshape(ROWS, BLOCK_K)
    else:
        o_row, o_k = first + tl.arange(0, ROWS), i_k + tl.arange(0, BLOCK_K)
        p = x + tl.cast(i_outer, tl.int64) * stride_outer
        p = p + tl.cast(o_row, tl.int64)[:, None] * stride_row + o_k[None, :]
        b = tl.load(p, mask=(o_row < n_rows)[:, None] & (o_k < C)[None, :], other=0.0)
    return b


@triton.jit
def _multiply(b_x, b_w, b_sum):
    """Return b_sum + b_x b_w^T."""
    return tl.dot(b_x, tl.trans(b_w), b_sum, input_precision="ieee")


@triton.jit
def _load_bias(p_bias, first_n, n_out, BLOCK_N: tl.constexpr):
    o_n = first_n + tl.arange(0, BLOCK_N)
    # [1, BLOCK_N]
    return tl.load(p_bias + o_n, mask=o_n < n_out, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(
    y, b, i_b, first_m, first_n, N, n_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write a tile of [B, N, O], which is contiguous, in its dtype; `y` as in `_load`."""
    if TMA:
        y.store([i_b, first_m, first_n], b.to(y.dtype).reshape(1, BLOCK_M, BLOCK_N))
    else:
        o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        row = tl.cast(i_b, tl.int64) * N + o_m
        p = y + row[:, None] * n_out + o_n[None, :]
        tl.store(p, b.to(y.dtype.element_ty), mask=(o_m < N)[:, None] & (o_n < n_out)[None, :])


@triton.jit
def _cache_read_fwd_kernel(
    current, cache, weight, p_bias, y, z, n_batch, N, C, n_out,
    stride_cb, stride_cn, stride_hb, stride_hn, stride_wh, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write y = SiLU(z), and z itself unless z is None."""
    i_b, m, n = _place(n_batch, N, n_out, BLOCK_M, BLOCK_N, GROUP_M)
    b_z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, C, BLOCK_K):
        b_x = _load(current, i_b, m, k, stride_cb, stride_cn, N, C, BLOCK_M, BLOCK_K, TMA)
        b_w = _load(weight, 0, n, k, stride_wh, stride_wn, n_out, C, BLOCK_N, BLOCK_K, TMA)
        b_z = _multiply(b_x, b_w, b_z)
    for k in tl.range(0, C, BLOCK_K):
        b_x = _load(cache, i_b, m, k, stride_hb, stride_hn, N, C, BLOCK_M, BLOCK_K, TMA)
        b_w = _load(weight, 1, n, k, stride_wh, stride_wn, n_out, C, BLOCK_N, BLOCK_K, TMA)
        b_z = _multiply(b_x, b_w, b_z)
    if p_bias is not None:
        b_z += _load_bias(p_bias, n, n_out, BLOCK_N)
    if z is not None:
        _store(z, b_z, i_b, m, n, N, n_out, BLOCK_M, BLOCK_N, TMA)
    _store(y, b_z * tl.sigmoid(b_z), i_b, m, n, N, n_out, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _cache_read_jvp_kernel(
    current, cache, weight, current_dot, cache_dot, weight_dot, p_bias, p_bias_dot,
    y, z, y_dot, n_batch, N, C, n_out,
    stride_cb, stride_cn, stride_hb, stride_hn, stride_wh, stride_wn,
    stride_cdb, stride_cdn, stride_hdb, stride_hdn, stride_wdh, stride_wdn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write y, z and y_dot = SiLU'(z) z_dot; an absent tangent is 0 and costs nothing.

    Without y only y_dot is written, without z only y and y_dot.
    """
    i_b, m, n = _place(n_batch, N, n_out, BLOCK_M, BLOCK_N, GROUP_M)
    b_z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_z_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, C, BLOCK_K):
        b_x = _load(current, i_b, m, k, stride_cb, stride_cn, N, C, BLOCK_M, BLOCK_K, TMA)
        b_w = _load(weight, 0, n, k, stride_wh, stride_wn, n_out, C, BLOCK_N, BLOCK_K, TMA)
        b_z = _multiply(b_x, b_w, b_z)
        if current_dot is not None:
            b_x_dot = _load(
                current_dot, i_b, m, k, stride_cdb, stride_cdn, N, C, BLOCK_M, BLOCK_K, TMA
            )
            b_z_dot = _multiply(b_x_dot, b_w, b_z_dot)
        if weight_dot is not None:
            b_w_dot = _load(
                weight_dot, 0, n, k, stride_wdh, stride_wdn, n_out, C, BLOCK_N, BLOCK_K, TMA
            )
            b_z_dot = _multiply(b_x, b_w_dot, b_z_dot)
    for k in tl.range(0, C, BLOCK_K):
        b_x = _load(cache, i_b, m, k, stride_hb, stride_hn, N, C, BLOCK_M, BLOCK_K, TMA)
        b_w = _load(weight, 1, n, k, stride_wh, stride_wn, n_out, C, BLOCK_N, BLOCK_K, TMA)
        b_z = _multiply(b_x, b_w, b_z)
        if cache_dot is not None:
            b_x_dot = _load(
                cache_dot, i_b, m, k, stride_hdb, stride_hdn, N, C, BLOCK_M, BLOCK_K, TMA
            )
            b_z_dot = _multiply(b_x_dot, b_w, b_z_dot)
        if weight_dot is not None:
            b_w_dot = _load(
                weight_dot, 1, n, k, stride_wdh, stride_wdn, n_out, C, BLOCK_N, BLOCK_K, TMA
            )
            b_z_dot = _multiply(b_x, b_w_dot, b_z_dot)
    if p_bias is not None:
        b_z += _load_bias(p_bias, n, n_out, BLOCK_N)
    if p_bias_dot is not None:
        b_z_dot += _load_bias(p_bias_dot, n, n_out, BLOCK_N)
    b_logistic = tl.sigmoid(b_z)
    b_y_dot = b_logistic * (1.0 + b_z * (1.0 - b_logistic)) * b_z_dot
    _store(y_dot, b_y_dot, i_b, m, n, N, n_out, BLOCK_M, BLOCK_N, TMA)
    if z is not None:
        _store(z, b_z, i_b, m, n, N, n_out, BLOCK_M, BLOCK_N, TMA)
    if y is not None:
        _store(y, b_z * b_logistic, i_b, m, n, N, n_out, BLOCK_M, BLOCK_N, TMA)


def _halves(weight: Tensor | None) -> Tensor | None:
    """View [O, 2C] as [2, O, C]: the half that meets `current`, and the one that meets `cache`."""
    return None if weight is None else weight.unflatten(1, (2, -1)).transpose(0, 1)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous_rows(x)


def _described(arrays: Sequence[Tensor | None]) -> list[list[int]] | None:
    """Return the descriptor strides of each array, none for an absent one; None means pointers."""
    first = arrays[0]
    if not has_descriptors(capability(first.device), first.element_size()):
        return None
    found = [[] if x is None else descriptor_strides(x) for x in arrays]
    return None if any(f is None for f in found) else found


class _Call(NamedTuple):
    """What a kernel is called with."""

    operands: list[Any]
    results: list[Any]
    numbers: list[int]
    constants: dict[str, Any]
    grid: tuple[int]


def _call(kernel: str, arrays: list[Tensor | None], results: list[Tensor | None]) -> _Call:
    """Prepare the call of a kernel.

    Args:
        kernel: its name in `Tiles`.
        arrays: tokens [B, N, C], tokens, halves of a weight [2, O, C], and perhaps their tangents.
        results: tensors [B, N, O], None for one that is not wanted.
    """
    current, n_outputs = arrays[0], arrays[2].shape[1]
    n_batch, n_tokens, n_channels = current.shape
    described = _described([*arrays, *results])
    # The interpreter has no registers to run out of, but is slow on many small tiles.
    itemsize = current.element_size() if current.is_cuda else 2
    tile: Tile = getattr(
        tiles_for(capability(current.device), itemsize, described is not None), kernel
    )
    given: list[Any] = [*arrays, *results]
    if described is not None:
        of_tokens, of_weight = (tile.block_m, tile.block_k), (tile.block_n, tile.block_k)
        blocks = [of_tokens, of_tokens, of_weight] * (len(arrays) // 3)
        blocks += [(tile.block_m, tile.block_n)] * len(results)
        given = [
            None if x is None else TensorDescriptor(x, list(x.shape), steps, [1, *block])
            for x, steps, block in zip(given, described, blocks, strict=True)
        ]
    strides = [s for x in arrays for s in ((0, 0) if x is None else row_strides(x))]
    tiles = triton.cdiv(n_tokens, tile.block_m) * triton.cdiv(n_outputs, tile.block_n)
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "TMA": described is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    numbers = [n_batch, n_tokens, n_channels, n_outputs, *strides]
    return _Call(given[: len(arrays)], given[len(arrays) :], numbers, constants, (n_batch * tiles,))


def _results(current: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Make room for y and, if it is to be kept, for z."""
    shape = (*current.shape[:2], weight.shape[0])
    y = torch.empty(shape, dtype=current.dtype, device=current.device)
    return y, torch.empty(shape if keep else 0, dtype=current.dtype, device=current.device)


def launch_fwd(
    operands: tuple[Tensor | None, ...], options: tuple[object, ...], keep: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, N, O] and z, the argument of SiLU, which is empty unless `keep`."""
    current, cache, weight, bias = map(_rows, operands)
    y, z = _results(current, weight, keep)
    if y.numel():
        arrays = [current, cache, _halves(weight)]
        call = _call("fwd_keep" if keep else "fwd", arrays, [y, z if keep else None])
        _cache_read_fwd_kernel[call.grid](
            *call.operands, bias, *call.results, *call.numbers, **call.constants
        )
    return y, z


def launch_jvp(
    primals: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    options: tuple[object, ...],
    with_value: bool,
    keep: bool,
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor]]:
    """Return y and z, as `launch_fwd` (None without `with_value`), and y_dot [B, N, O]."""
    current, cache, weight, bias = map(_rows, primals)
    current_dot, cache_dot, weight_dot, bias_dot = map(_rows, tangents)
    y_dot, z = _results(current, weight, keep and with_value)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel():
        arrays = [current, cache, _halves(weight), current_dot, cache_dot, _halves(weight_dot)]
        kernel = "jvp" if weight_dot is None else "jvp_weight"
        call = _call(kernel, arrays, [y, z if z.numel() else None, y_dot])
        _cache_read_jvp_kernel[call.grid](
            *call.operands, bias, bias_dot, *call.results, *call.numbers, **call.constants
        )
    return None if y is None else (y, z), (y_dot,)
