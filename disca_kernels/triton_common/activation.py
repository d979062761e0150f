# SPDX-License-Identifier: Apache-2.0
"""Activations with their slopes, and the tiles in which elementwise kernels of tokens work.

A sigmoid is taken of -|w|, so that no power overflows, and its derivative as a product, so that
nothing cancels: both are accurate in both tails. Beyond a limit, where the sigmoid is 0 or 1 in
float32, z is replaced by the limit, so that no product is 0 * inf. NaN stays NaN: a comparison with
it is false.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# 2 sqrt(2 / pi) log2(e), and the same times 0.044715 and 3 * 0.044715; then without log2(e).
_GELU_LINEAR = tl.constexpr(2.302208198144325)
_GELU_CUBIC = tl.constexpr(0.10294323956802348)
_GELU_SLOPE = tl.constexpr(1.5957691216057308)
_GELU_CURVE = tl.constexpr(0.21406444906579482)
_GELU_LIMIT = tl.constexpr(24.0)
_SILU_LIMIT = tl.constexpr(128.0)

TILE_ROWS, TILE_COLUMNS, NUM_WARPS = 4, 512, 4
"""A thread of such a tile holds 16 elements of each operand: two loads of 16 bytes in bfloat16."""


@triton.jit
def _sigmoid(b_w):
    """Return the sigmoid of `w / log2(e)` and its derivative by `w / log2(e)`."""
    b_power = tl.exp2(-tl.abs(b_w))
    b_large = 1.0 / (1.0 + b_power)
    b_small = b_power * b_large
    return tl.where(b_w < 0.0, b_small, b_large), b_small * b_large


@triton.jit
def gelu_tanh(b_z):
    """Return the tanh form of GELU and its slope."""
    b_low = tl.where(b_z < -_GELU_LIMIT, -_GELU_LIMIT, b_z)
    b_inner = tl.where(b_low > _GELU_LIMIT, _GELU_LIMIT, b_low)
    b_square = b_inner * b_inner
    b_sigmoid, b_derivative = _sigmoid(b_inner * (_GELU_LINEAR + _GELU_CUBIC * b_square))
    b_inner_slope = b_inner * (_GELU_SLOPE + _GELU_CURVE * b_square)
    return b_low * b_sigmoid, b_sigmoid + b_inner_slope * b_derivative


@triton.jit
def silu(b_z):
    """Return `z * sigmoid(z)` and its slope."""
    b_low = tl.where(b_z < -_SILU_LIMIT, -_SILU_LIMIT, b_z)
    b_inner = tl.where(b_low > _SILU_LIMIT, _SILU_LIMIT, b_low)
    b_sigmoid, b_derivative = _sigmoid(b_inner * _LOG2_E)
    return b_low * b_sigmoid, b_sigmoid + b_inner * b_derivative


@triton.jit
def tile_at(i_tile, N, n_across, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return sample, rows and channels of a tile; the tiles of a row follow each other.

    Returns:
        i_b, o_n [BLOCK_N] and o_c [BLOCK_C], and which of the tiles across it is.
    """
    n_down = tl.cdiv(N, BLOCK_N)
    i_across = i_tile % n_across
    i_row = i_tile // n_across
    i_b = (i_row // n_down).to(tl.int64)
    o_n = (i_row % n_down).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = i_across * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_b, o_n, o_c, i_across


@triton.jit
def store_rows(p_rows, b_rows, i_b, o_n, o_c, N, stride_n, m_rows):
    """Store a tile of rows in the dtype of the pointer; samples follow each other."""
    # [BLOCK_N, BLOCK_C]
    p_tile = p_rows + (i_b * N + o_n)[:, None] * stride_n + o_c[None, :]
    tl.store(p_tile, b_rows.to(p_rows.dtype.element_ty), mask=m_rows)
