# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of SwiGLU, and their launchers.

Gate and up are two pointers into one tensor, so that a kernel does not know which comes first.
"""

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
def _load_half(p_rows, p_bias, i_b, o_n, o_m, stride_b, stride_n, m_rows, m_m):
    """Load a tile of rows and add a bias; None stands for zero, of both for 0.0."""
    b_half = 0.0
    if p_rows is not None:
        b_half = load_rows(p_rows, i_b, o_n, o_m, stride_b, stride_n, m_rows)
    if p_bias is not None:
        b_half = b_half + load_channels(p_bias, o_m, m_m)
    return b_half


@triton.jit
def _swiglu_fwd_kernel(
    p_gate, p_up, p_gate_bias, p_up_bias, p_y, N, M, stride_xb, stride_xn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write `silu(gate) * up` for one tile of [B, N, M]."""
    i_b, o_n, o_m, _ = activation.tile_at(
        tl.program_id(0), N, tl.cdiv(M, BLOCK_M), BLOCK_N, BLOCK_M
    )
    m_m = o_m < M
    m_rows = (o_n < N)[:, None] & m_m[None, :]
    b_gate = _load_half(p_gate, p_gate_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
    b_up = _load_half(p_up, p_up_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
    b_active, _ = activation.silu(b_gate)
    activation.store_rows(p_y, b_active * b_up, i_b, o_n, o_m, N, M, m_rows)


@triton.jit
def _swiglu_jvp_kernel(
    p_gate, p_up, p_gate_bias, p_up_bias, p_gate_dot, p_up_dot, p_gate_bias_dot, p_up_bias_dot,
    p_y, p_y_dot, N, M, stride_xb, stride_xn, stride_xdb, stride_xdn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write value and tangent of one tile; see the reference for the formula.

    A tangent whose pointer is None is zero; without p_y only y_dot is written.
    """
    i_b, o_n, o_m, _ = activation.tile_at(
        tl.program_id(0), N, tl.cdiv(M, BLOCK_M), BLOCK_N, BLOCK_M
    )
    m_m = o_m < M
    m_rows = (o_n < N)[:, None] & m_m[None, :]
    b_gate = _load_half(p_gate, p_gate_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
    b_up = _load_half(p_up, p_up_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
    b_active, b_slope = activation.silu(b_gate)
    if p_y is not None:
        activation.store_rows(p_y, b_active * b_up, i_b, o_n, o_m, N, M, m_rows)
    b_gate_dot = _load_half(
        p_gate_dot, p_gate_bias_dot, i_b, o_n, o_m, stride_xdb, stride_xdn, m_rows, m_m
    )
    b_up_dot = _load_half(
        p_up_dot, p_up_bias_dot, i_b, o_n, o_m, stride_xdb, stride_xdn, m_rows, m_m
    )
    b_y_dot = b_slope * b_up * b_gate_dot + b_active * b_up_dot
    activation.store_rows(p_y_dot, b_y_dot, i_b, o_n, o_m, N, M, m_rows)


@triton.jit
def _swiglu_bwd_kernel(
    p_dy, p_gate, p_up, p_gate_bias, p_up_bias, p_dgate, p_dup, p_dgate_bias, p_dup_bias, N, M,
    n_splits, rows_per_split, stride_yb, stride_yn, stride_xb, stride_xn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one split of a sample's rows, and their sums over them for the bias.

    dgate and dup are the halves of rows of 2M. The sums go to row `i_b * n_splits + i_split` of
    [B * n_splits, 2M]. Gradients whose pointers are None are not computed.
    """
    n_tiles = tl.cdiv(M, BLOCK_M)
    i_row = tl.program_id(0) // n_tiles
    i_b = (i_row // n_splits).to(tl.int64)
    o_m = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    first = (i_row % n_splits).to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    if p_dgate_bias is not None:
        b_dgate_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_dup_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_rows = (o_n < last)[:, None] & m_m[None, :]
        b_gate = _load_half(p_gate, p_gate_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
        b_up = _load_half(p_up, p_up_bias, i_b, o_n, o_m, stride_xb, stride_xn, m_rows, m_m)
        b_dy = load_rows(p_dy, i_b, o_n, o_m, stride_yb, stride_yn, m_rows)
        b_active, b_slope = activation.silu(b_gate)
        b_dgate = b_dy * b_slope * b_up
        b_dup = b_dy * b_active
        if p_dgate is not None:
            activation.store_rows(p_dgate, b_dgate, i_b, o_n, o_m, N, 2 * M, m_rows)
            activation.store_rows(p_dup, b_dup, i_b, o_n, o_m, N, 2 * M, m_rows)
        if p_dgate_bias is not None:
            b_dgate_sum += b_dgate
            b_dup_sum += b_dup
    if p_dgate_bias is not None:
        # [BLOCK_M]
        o_sum = i_row.to(tl.int64) * (2 * M) + o_m
        tl.store(p_dgate_bias + o_sum, tl.sum(b_dgate_sum, axis=0), mask=m_m)
        tl.store(p_dup_bias + o_sum, tl.sum(b_dup_sum, axis=0), mask=m_m)


def _halves(packed: Tensor | None, gate_first: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return gate and up of [..., 2M], views."""
    if packed is None:
        return None, None
    half = packed.shape[-1] // 2
    first, second = packed[..., :half], packed[..., half:]
    return (first, second) if gate_first else (second, first)


def _empty(x: Tensor) -> tuple[Tensor, tuple[int]]:
    """Return y [B, N, M] and the grid of its tiles."""
    n_batch, n_tokens, width = x.shape
    y = torch.empty((n_batch, n_tokens, width // 2), dtype=x.dtype, device=x.device)
    across = triton.cdiv(width // 2, TILE_COLUMNS)
    return y, (n_batch * triton.cdiv(n_tokens, TILE_ROWS) * across,)


def launch_fwd(operands: Operands, options: tuple[bool], keep: bool) -> tuple[Tensor]:
    """Return y [B, N, M] in the dtype of x; `options` are gate_first."""
    x, bias = contiguous_operands(operands)
    y, grid = _empty(x)
    if y.numel() > 0:
        _swiglu_fwd_kernel[grid](
            *_halves(x, *options), *_halves(bias, *options), y, *y.shape[1:], *row_strides(x),
            BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[bool]
) -> Operands:
    """Return dx and dbias, None for what is not needed; sums in a fixed order."""
    x, bias = contiguous_operands(saved)
    dy = contiguous_rows(cotangents[0])
    n_batch, n_tokens, n_columns = dy.shape
    across = triton.cdiv(n_columns, TILE_COLUMNS)
    rows = rows_per_split(n_batch * across, n_tokens, TILE_ROWS) if needs[1] else TILE_ROWS
    n_splits = triton.cdiv(n_tokens, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    sums = None
    if needs[1]:
        shape = (n_batch * n_splits, 2 * n_columns)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        _swiglu_bwd_kernel[(n_batch * n_splits * across,)](
            dy, *_halves(x, *options), *_halves(bias, *options), *_halves(dx, *options),
            *_halves(sums, *options), n_tokens, n_columns, n_splits, rows, *row_strides(dy),
            *row_strides(x), BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(bias.dtype)


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[bool], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return y (None without `with_value`) and y_dot, both [B, N, M]."""
    x, bias = contiguous_operands(primals)
    x_dot, bias_dot = contiguous_operands(tangents)
    y_dot, grid = _empty(x)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel() > 0:
        halves = [h for t in (x, bias, x_dot, bias_dot) for h in _halves(t, *options)]
        _swiglu_jvp_kernel[grid](
            *halves, y, y_dot, *y_dot.shape[1:], *row_strides(x), *strides_of(x_dot),
            BLOCK_N=TILE_ROWS, BLOCK_M=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return None if y is None else (y,), (y_dot,)
