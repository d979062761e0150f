# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of GELU with bias and prefix, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_operands, contiguous_rows, row_strides, strides_of
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common import activation
from disca_kernels.triton_common.activation import NUM_WARPS, TILE_COLUMNS, TILE_ROWS
from disca_kernels.triton_common.rows import load_channels, load_rows, rows_per_split

prepare_interpreter()

Operands = tuple[Tensor | None, ...]


@triton.jit
def _copy_heads(
    p_prefix, p_y, i_b, o_n, o_c, N, D, P, stride_pb, stride_ph, stride_pn, stride_yn
):  # fmt: skip
    """Copy a tile of [B, H, N, D] to the front of rows of y, zeros if the pointer is None."""
    m_rows = (o_n < N)[:, None] & (o_c < P)[None, :]
    # [BLOCK_N, BLOCK_M]
    p_out = p_y + (i_b * N + o_n)[:, None] * stride_yn + o_c[None, :]
    if p_prefix is not None:
        o_head = (o_c // D).to(tl.int64) * stride_ph + o_c % D
        p_in = p_prefix + i_b * stride_pb + o_n[:, None] * stride_pn + o_head[None, :]
        b_prefix = tl.load(p_in, mask=m_rows, other=0.0)
        tl.store(p_out, b_prefix, mask=m_rows)
    else:
        b_zero = tl.zeros([o_n.shape[0], o_c.shape[0]], p_y.dtype.element_ty)
        tl.store(p_out, b_zero, mask=m_rows)


@triton.jit
def _gelu_tanh_fwd_kernel(
    p_x, p_bias, p_prefix, p_y, N, M, D, P, stride_xb, stride_xn, stride_pb, stride_ph, stride_pn,
    stride_yn, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write `gelu(x + bias)`, or the prefix in front of it, for one tile of [B, N, P + M].

    The tiles of the prefix come after those of x.
    """
    n_tiles = tl.cdiv(M, BLOCK_M)
    i_b, o_n, o_m, i_across = activation.tile_at(
        tl.program_id(0), N, n_tiles + tl.cdiv(P, BLOCK_M), BLOCK_N, BLOCK_M
    )
    if i_across < n_tiles:
        m_m = o_m < M
        m_rows = (o_n < N)[:, None] & m_m[None, :]
        b_z = load_rows(p_x, i_b, o_n, o_m, stride_xb, stride_xn, m_rows)
        if p_bias is not None:
            b_z += load_channels(p_bias, o_m, m_m)
        b_y, _ = activation.gelu_tanh(b_z)
        activation.store_rows(p_y + P, b_y, i_b, o_n, o_m, N, stride_yn, m_rows)
    else:
        o_c = o_m - n_tiles * BLOCK_M
        _copy_heads(
            p_prefix, p_y, i_b, o_n, o_c, N, D, P, stride_pb, stride_ph, stride_pn, stride_yn
        )


@triton.jit
def _gelu_tanh_jvp_kernel(
    p_x, p_bias, p_prefix, p_x_dot, p_bias_dot, p_prefix_dot, p_y, p_y_dot, N, M, D, P,
    stride_xb, stride_xn, stride_pb, stride_ph, stride_pn, stride_xdb, stride_xdn, stride_pdb,
    stride_pdh, stride_pdn, stride_yn, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write value and tangent of one tile, as the forward kernel the value.

    A tangent whose pointer is None is zero; without p_y only y_dot is written.
    """
    n_tiles = tl.cdiv(M, BLOCK_M)
    i_b, o_n, o_m, i_across = activation.tile_at(
        tl.program_id(0), N, n_tiles + tl.cdiv(P, BLOCK_M), BLOCK_N, BLOCK_M
    )
    if i_across < n_tiles:
        m_m = o_m < M
        m_rows = (o_n < N)[:, None] & m_m[None, :]
        b_z = load_rows(p_x, i_b, o_n, o_m, stride_xb, stride_xn, m_rows)
        if p_bias is not None:
            b_z += load_channels(p_bias, o_m, m_m)
        b_y, b_slope = activation.gelu_tanh(b_z)
        b_dot = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if p_x_dot is not None:
            b_dot += load_rows(p_x_dot, i_b, o_n, o_m, stride_xdb, stride_xdn, m_rows)
        if p_bias_dot is not None:
            b_dot += load_channels(p_bias_dot, o_m, m_m)
        b_dot *= b_slope
        if p_y is not None:
            activation.store_rows(p_y + P, b_y, i_b, o_n, o_m, N, stride_yn, m_rows)
        activation.store_rows(p_y_dot + P, b_dot, i_b, o_n, o_m, N, stride_yn, m_rows)
    else:
        o_c = o_m - n_tiles * BLOCK_M
        if p_y is not None:
            _copy_heads(
                p_prefix, p_y, i_b, o_n, o_c, N, D, P, stride_pb, stride_ph, stride_pn, stride_yn
            )
        _copy_heads(
            p_prefix_dot, p_y_dot, i_b, o_n, o_c, N, D, P, stride_pdb, stride_pdh, stride_pdn,
            stride_yn,
        )  # fmt: skip


@triton.jit
def _gelu_tanh_bwd_kernel(
    p_dy, p_x, p_bias, p_dx, p_dbias, N, M, n_splits, rows_per_split, stride_yb, stride_yn,
    stride_xb, stride_xn, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write dx of one split of a sample's rows, and its sum over them for the bias.

    The sum goes to row `i_b * n_splits + i_split` of [B * n_splits, M]. A gradient whose pointer is
    None is not computed.
    """
    n_tiles = tl.cdiv(M, BLOCK_M)
    i_row = tl.program_id(0) // n_tiles
    i_b = (i_row // n_splits).to(tl.int64)
    o_m = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    first = (i_row % n_splits).to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    if p_bias is not None:
        b_bias = load_channels(p_bias, o_m, m_m)
    if p_dbias is not None:
        b_dbias = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_rows = (o_n < last)[:, None] & m_m[None, :]
        b_z = load_rows(p_x, i_b, o_n, o_m, stride_xb, stride_xn, m_rows)
        b_dy = load_rows(p_dy, i_b, o_n, o_m, stride_yb, stride_yn, m_rows)
        if p_bias is not None:
            b_z += b_bias
        _, b_slope = activation.gelu_tanh(b_z)
        b_dx = b_dy * b_slope
        if p_dx is not None:
            activation.store_rows(p_dx, b_dx, i_b, o_n, o_m, N, M, m_rows)
        if p_dbias is not None:
            b_dbias += b_dx
    if p_dbias is not None:
        # [BLOCK_M]
        p_sum = p_dbias + i_row.to(tl.int64) * M + o_m
        tl.store(p_sum, tl.sum(b_dbias, axis=0), mask=m_m)


def _head_strides(prefix: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if prefix is None else prefix.stride()[:3]


def _grid(x: Tensor, width: int) -> tuple[int]:
    n_batch, n_tokens, n_columns = x.shape
    across = triton.cdiv(n_columns, TILE_COLUMNS) + triton.cdiv(width, TILE_COLUMNS)
    return (n_batch * triton.cdiv(n_tokens, TILE_ROWS) * across,)


def launch_fwd(operands: Operands, options: tuple[int, int], keep: bool) -> tuple[Tensor]:
    """Return y [B, N, P + M]; `options` are heads and head width of the prefix."""
    x, bias, prefix = contiguous_operands(operands)
    width = options[0] * options[1]
    y = torch.empty((*x.shape[:2], width + x.shape[2]), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        _gelu_tanh_fwd_kernel[_grid(x, width)](
            x, bias, prefix, y, x.shape[1], x.shape[2], options[1], width, *row_strides(x),
            *_head_strides(prefix), y.shape[2],
            BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[int, int]
) -> Operands:
    """Return dx and dbias, None for what is not needed; sums in a fixed order."""
    x, bias = contiguous_operands(saved)
    dy = contiguous_rows(cotangents[0][..., options[0] * options[1] :])
    n_batch, n_tokens, n_columns = x.shape
    across = triton.cdiv(n_columns, TILE_COLUMNS)
    rows = rows_per_split(n_batch * across, n_tokens, TILE_ROWS) if needs[1] else TILE_ROWS
    n_splits = triton.cdiv(n_tokens, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    sums = None
    if needs[1]:
        shape = (n_batch * n_splits, n_columns)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        _gelu_tanh_bwd_kernel[(n_batch * n_splits * across,)](
            dy, x, bias, dx, sums, n_tokens, n_columns, n_splits, rows, *row_strides(dy),
            *row_strides(x), BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(bias.dtype), None


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[int, int], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return y (None without `with_value`) and y_dot, both [B, N, P + M]."""
    x, bias, prefix = contiguous_operands(primals)
    x_dot, bias_dot, prefix_dot = contiguous_operands(tangents)
    width = options[0] * options[1]
    y_dot = torch.empty((*x.shape[:2], width + x.shape[2]), dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel() > 0:
        _gelu_tanh_jvp_kernel[_grid(x, width)](
            x, bias, prefix, x_dot, bias_dot, prefix_dot, y, y_dot, x.shape[1], x.shape[2],
            options[1], width, *row_strides(x), *_head_strides(prefix),
            *strides_of(x_dot), *_head_strides(prefix_dot), y_dot.shape[2],
            BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return None if y is None else (y,), (y_dot,)
