# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of query-key normalisation do with the rows of one head.

Rows are held as two halves of D / 2 elements, the first and the second channels of the pairs that
are turned.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(p_rows, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load rows as float32: the first and the second channels of their pairs."""
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_H)[None, :]
        # [ROWS, 2 * BLOCK_H]
        b_rows = tl.load(p_rows + o_d, mask=m_rows & (o_d < D), other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_rows, [p_rows.shape[0], BLOCK_H, 2]))
    else:
        o_h = tl.arange(0, BLOCK_H)[None, :]
        m_tile = m_rows & (o_h < D // 2)
        # [ROWS, BLOCK_H]
        b_a = tl.load(p_rows + o_h, mask=m_tile, other=0.0).to(tl.float32)
        b_b = tl.load(p_rows + D // 2 + o_h, mask=m_tile, other=0.0).to(tl.float32)
    return b_a, b_b


@triton.jit
def load_pairs_or_zeros(
    p_base, o_rows, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Load pairs; zeros where there is nothing to load."""
    if p_base is None:
        b_a = tl.zeros([m_rows.shape[0], BLOCK_H], tl.float32)
        b_b = b_a
    else:
        b_a, b_b = load_pairs(p_base + o_rows, m_rows, D, BLOCK_H, INTERLEAVED)
    return b_a, b_b


@triton.jit
def store_pairs(
    p_rows, b_a, b_b, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store rows that `load_pairs` would load."""
    dtype = p_rows.dtype.element_ty
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_H)[None, :]
        b_rows = tl.reshape(tl.join(b_a, b_b), [p_rows.shape[0], 2 * BLOCK_H])
        # [ROWS, 2 * BLOCK_H]
        tl.store(p_rows + o_d, b_rows.to(dtype), mask=m_rows & (o_d < D))
    else:
        o_h = tl.arange(0, BLOCK_H)[None, :]
        m_tile = m_rows & (o_h < D // 2)
        # [ROWS, BLOCK_H]
        tl.store(p_rows + o_h, b_a.to(dtype), mask=m_tile)
        tl.store(p_rows + D // 2 + o_h, b_b.to(dtype), mask=m_tile)


@triton.jit
def load_weight(p_weight, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load a weight of all heads as pairs [1, BLOCK_H]; without one it is 1."""
    o_row = tl.zeros([1, 1], tl.int32)
    if p_weight is None:
        b_a = tl.full([1, BLOCK_H], 1.0, tl.float32)
        b_b = b_a
    else:
        b_a, b_b = load_pairs(p_weight + o_row, o_row == 0, D, BLOCK_H, INTERLEAVED)
    return b_a, b_b


@triton.jit
def load_angles(p_cos, p_sin, o_n, rope_tokens, D: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load cosines and sines of some tokens; later tokens, which do not turn, have 1 and 0.

    Without tables both are the number 0, which nothing reads.
    """
    if p_cos is None:
        b_cos = 0.0
        b_sin = 0.0
    else:
        o_h = tl.arange(0, BLOCK_H)[None, :]
        m_tile = (o_n < rope_tokens)[:, None] & (o_h < D // 2)
        o_tile = o_n[:, None] * (D // 2) + o_h
        # [BLOCK_N, BLOCK_H]
        b_cos = tl.load(p_cos + o_tile, mask=m_tile, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    return b_cos, b_sin


@triton.jit
def normalise(b_a, b_b, D: tl.constexpr, eps):
    """Return rows divided by the roots of their mean squares, and the reciprocals of those."""
    b_squares = tl.sum(b_a * b_a + b_b * b_b, axis=1, keep_dims=True)
    b_rstd = 1.0 / tl.sqrt_rn(b_squares / D + eps)
    return b_a * b_rstd, b_b * b_rstd, b_rstd


@triton.jit
def store_turned(
    p_rows, b_a, b_b, b_cos, b_sin, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Turn pairs, if they are turned, and store them."""
    b_first, b_second = b_a, b_b
    if ROPE:
        b_first = b_a * b_cos - b_b * b_sin
        b_second = b_a * b_sin + b_b * b_cos
    store_pairs(p_rows, b_first, b_second, m_rows, D, BLOCK_H, INTERLEAVED)


@triton.jit
def load_rows(p_base, o_rows, p_like, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load rows as they are; zeros in the dtype of p_like where there is nothing to load."""
    o_d = tl.arange(0, 2 * BLOCK_H)[None, :]
    if p_base is None:
        b_rows = tl.zeros([m_rows.shape[0], 2 * BLOCK_H], p_like.dtype.element_ty)
    else:
        # [ROWS, 2 * BLOCK_H]
        b_rows = tl.load(p_base + o_rows + o_d, mask=m_rows & (o_d < D), other=0.0)
    return b_rows


@triton.jit
def store_rows(p_rows, b_rows, m_rows, D: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store what `load_rows` loaded."""
    o_d = tl.arange(0, 2 * BLOCK_H)[None, :]
    # [ROWS, 2 * BLOCK_H]
    tl.store(p_rows + o_d, b_rows, mask=m_rows & (o_d < D))
