# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: where a program works, which keys it sees, how it loads them.

An operand of [B, H, N, D] comes in one of two forms. With TMA it is a tensor descriptor whose block
is [1, 1, rows, BLOCK_D]: the hardware computes the addresses, which frees the registers that
pointers need, and reads 0 outside the tensor. Otherwise it is a pointer with three strides, the
last dimension contiguous. The strides are unused, and cost nothing, with a descriptor.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    x, i_b, i_h, first, stop, stride_b, stride_h, stride_n,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Read x[i_b, i_h, first : first + BLOCK], 0 from row `stop` on: [BLOCK, BLOCK_D].

    WHOLE promises that all rows are wanted and exist. Rows from `stop` on that exist can hold NaN.
    """
    o_n = tl.arange(0, BLOCK)
    if TMA:
        b = x.load([tl.cast(i_b, tl.int32), tl.cast(i_h, tl.int32), first, 0]).reshape(
            BLOCK, BLOCK_D
        )
        if not WHOLE:
            b = tl.where((o_n < stop - first)[:, None], b, 0.0)
    else:
        o_d = tl.arange(0, BLOCK_D)
        # Offsets inside the block are 32 bits wide, to save registers: layout.rows sees to that.
        p = x + i_b * stride_b + i_h * stride_h + tl.cast(first, tl.int64) * stride_n
        p = p + o_n[:, None] * stride_n + o_d[None, :]
        if WHOLE and D == BLOCK_D:
            b = tl.load(p)
        else:
            m = (o_d < D)[None, :]
            if not WHOLE:
                m = m & (o_n < stop - first)[:, None]
            b = tl.load(p, mask=m, other=0.0)
    return b


@triton.jit
def load_dense(p, row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read BLOCK rows of contiguous memory from `row` on, 0 beyond `rows`, as float32."""
    o_n, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m = (o_n < rows)[:, None] & (o_d < D)[None, :]
    return tl.load(p + row * D + o_n[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_dense(p, b, row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write BLOCK rows to contiguous memory from `row` on, none beyond `rows`, in its dtype."""
    o_n, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m = (o_n < rows)[:, None] & (o_d < D)[None, :]
    tl.store(p + row * D + o_n[:, None] * D + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def program(p_lengths, H, N, NK, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return this program's first row, its sample and head (int64), and the valid keys.

    LAST_FIRST starts with the last rows, which see the most keys under a causal rule: the
    programs that take longest are then not the ones that finish last.
    """
    blocks = tl.cdiv(N, BLOCK)
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    if LAST_FIRST:
        i_block = blocks - 1 - i_block
    n_keys = NK
    if p_lengths is not None:
        n_keys = tl.load(p_lengths + i_bh // H).to(tl.int64)
        n_keys = tl.minimum(tl.maximum(n_keys, 0), NK).to(tl.int32)
    return i_block * BLOCK, i_bh // H, i_bh % H, n_keys


@triton.jit
def key_limits(o_m, n_keys, NQ, NK, block, CAUSAL: tl.constexpr):
    """Return for each query the number of keys that it sees, which are the first ones."""
    if CAUSAL:
        position = o_m + (NK - NQ)
        # Division rounds towards 0, where a query before the first key has to see nothing.
        seen = tl.where(position < 0, 0, (position // block + 1) * block)
        return tl.minimum(seen, n_keys)
    return o_m * 0 + n_keys


@triton.jit
def key_range(
    first, n_keys, NQ, NK, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return where the key blocks that need a mask begin, and where the last of them ends."""
    low = key_limits(first, n_keys, NQ, NK, block, CAUSAL)
    high = key_limits(tl.minimum(first + BLOCK_M, NQ) - 1, n_keys, NQ, NK, block, CAUSAL)
    return low // BLOCK_N * BLOCK_N, high


@triton.jit
def scores_dot(b_q, b_q_dot, b_k, b_k_dot, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return Q_dot K^T + Q K_dot^T, without the product of an absent tangent."""
    b_s_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if b_q_dot is not None:
        b_s_dot = tl.dot(b_q_dot, tl.trans(b_k), b_s_dot, input_precision="ieee")
    if b_k_dot is not None:
        b_s_dot = tl.dot(b_q, tl.trans(b_k_dot), b_s_dot, input_precision="ieee")
    return b_s_dot
