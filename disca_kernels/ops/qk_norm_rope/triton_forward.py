# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of query-key normalisation with rotary embedding: value, value and tangent."""

import triton
import triton.language as tl

from disca_kernels.ops.qk_norm_rope.triton_blocks import (
    load_angles,
    load_pairs,
    load_pairs_or_zeros,
    load_rows,
    load_weight,
    normalise,
    store_rows,
    store_turned,
)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    p_qkv,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_q,
    p_k,
    p_v,
    N,
    H,
    rope_tokens,
    eps,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yh,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write queries, keys and values of BLOCK_N tokens and HEADS heads."""
    ROPE: tl.constexpr = p_cos is not None
    n_groups = tl.cdiv(H, HEADS)
    n_tiles = tl.cdiv(N, BLOCK_N)
    first = (tl.program_id(0) % n_groups).to(tl.int64) * HEADS
    i_tile = tl.program_id(0) // n_groups
    i_b = (i_tile // n_tiles).to(tl.int64)
    o_n = (i_tile % n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_cos, b_sin = load_angles(p_cos, p_sin, o_n, rope_tokens, D, BLOCK_H)
    b_wqa, b_wqb = load_weight(p_q_weight, D, BLOCK_H, INTERLEAVED)
    b_wka, b_wkb = load_weight(p_k_weight, D, BLOCK_H, INTERLEAVED)
    for i in range(HEADS):
        i_h = first + i
        # [BLOCK_N, 1]
        m_rows = (o_n < tl.where(i_h < H, N, 0))[:, None]
        o_x = i_b * stride_xb + i_h * D + o_n[:, None] * stride_xn
        o_y = i_b * stride_yb + i_h * stride_yh + o_n[:, None] * D
        # All loads come before the first store, which the compiler cannot move them across.
        p_x = p_qkv + o_x
        b_qa, b_qb = load_pairs(p_x, m_rows, D, BLOCK_H, INTERLEAVED)
        b_ka, b_kb = load_pairs(p_x + H * D, m_rows, D, BLOCK_H, INTERLEAVED)
        b_v = load_rows(p_qkv, o_x + 2 * H * D, p_v, m_rows, D, BLOCK_H)
        b_qa, b_qb, _ = normalise(b_qa, b_qb, D, eps)
        b_ka, b_kb, _ = normalise(b_ka, b_kb, D, eps)
        store_turned(
            p_q + o_y, b_qa * b_wqa, b_qb * b_wqb, b_cos, b_sin, m_rows, D, BLOCK_H, INTERLEAVED,
            ROPE,
        )  # fmt: skip
        store_turned(
            p_k + o_y, b_ka * b_wka, b_kb * b_wkb, b_cos, b_sin, m_rows, D, BLOCK_H, INTERLEAVED,
            ROPE,
        )  # fmt: skip
        store_rows(p_v + o_y, b_v, m_rows, D, BLOCK_H)


@triton.jit
def _store_value_and_tangent(
    p_y, p_y_dot, o_y, b_a, b_b, b_a_dot, b_b_dot, b_wa, b_wb, b_wa_dot, b_wb_dot, b_cos, b_sin,
    m_rows, eps, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROPE: tl.constexpr, ALONG_ROWS: tl.constexpr, ALONG_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Store value (if p_y is not None) and tangent of one head's rows of queries or keys."""
    b_a, b_b, b_rstd = normalise(b_a, b_b, D, eps)
    if p_y is not None:
        store_turned(
            p_y + o_y, b_a * b_wa, b_b * b_wb, b_cos, b_sin, m_rows, D, BLOCK_H, INTERLEAVED, ROPE
        )
    if ALONG_ROWS:
        b_along = tl.sum(b_a * b_a_dot + b_b * b_b_dot, axis=1, keep_dims=True) / D
        b_a_dot = b_rstd * (b_a_dot - b_a * b_along) * b_wa
        b_b_dot = b_rstd * (b_b_dot - b_b * b_along) * b_wb
    if ALONG_WEIGHT:
        b_a_dot += b_a * b_wa_dot
        b_b_dot += b_b * b_wb_dot
    store_turned(
        p_y_dot + o_y, b_a_dot, b_b_dot, b_cos, b_sin, m_rows, D, BLOCK_H, INTERLEAVED, ROPE
    )


@triton.jit
def _qk_norm_rope_jvp_kernel(
    p_qkv,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_qkv_dot,
    p_q_weight_dot,
    p_k_weight_dot,
    p_q,
    p_k,
    p_v,
    p_q_dot,
    p_k_dot,
    p_v_dot,
    N,
    H,
    rope_tokens,
    eps,
    stride_xb,
    stride_xn,
    stride_xdb,
    stride_xdn,
    stride_yb,
    stride_yh,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write values and tangents of BLOCK_N tokens and HEADS heads; the reference has the formula.

    A tangent whose pointer is None is zero and costs nothing; without p_q, p_k and p_v only the
    tangents are written.
    """
    ROPE: tl.constexpr = p_cos is not None
    n_groups = tl.cdiv(H, HEADS)
    n_tiles = tl.cdiv(N, BLOCK_N)
    first = (tl.program_id(0) % n_groups).to(tl.int64) * HEADS
    i_tile = tl.program_id(0) // n_groups
    i_b = (i_tile // n_tiles).to(tl.int64)
    o_n = (i_tile % n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_cos, b_sin = load_angles(p_cos, p_sin, o_n, rope_tokens, D, BLOCK_H)
    b_wqa, b_wqb = load_weight(p_q_weight, D, BLOCK_H, INTERLEAVED)
    b_wka, b_wkb = load_weight(p_k_weight, D, BLOCK_H, INTERLEAVED)
    b_wqa_dot, b_wqb_dot = load_weight(p_q_weight_dot, D, BLOCK_H, INTERLEAVED)
    b_wka_dot, b_wkb_dot = load_weight(p_k_weight_dot, D, BLOCK_H, INTERLEAVED)
    for i in range(HEADS):
        i_h = first + i
        # [BLOCK_N, 1]
        m_rows = (o_n < tl.where(i_h < H, N, 0))[:, None]
        o_x = i_b * stride_xb + i_h * D + o_n[:, None] * stride_xn
        o_x_dot = i_b * stride_xdb + i_h * D + o_n[:, None] * stride_xdn
        o_y = i_b * stride_yb + i_h * stride_yh + o_n[:, None] * D
        # All loads come before the first store, which the compiler cannot move them across.
        p_x = p_qkv + o_x
        b_qa, b_qb = load_pairs(p_x, m_rows, D, BLOCK_H, INTERLEAVED)
        b_ka, b_kb = load_pairs(p_x + H * D, m_rows, D, BLOCK_H, INTERLEAVED)
        b_qa_dot, b_qb_dot = load_pairs_or_zeros(
            p_qkv_dot, o_x_dot, m_rows, D, BLOCK_H, INTERLEAVED
        )
        b_ka_dot, b_kb_dot = load_pairs_or_zeros(
            p_qkv_dot, o_x_dot + H * D, m_rows, D, BLOCK_H, INTERLEAVED
        )
        b_v_dot = load_rows(p_qkv_dot, o_x_dot + 2 * H * D, p_v_dot, m_rows, D, BLOCK_H)
        if p_v is not None:
            b_v = load_rows(p_qkv, o_x + 2 * H * D, p_v, m_rows, D, BLOCK_H)
            store_rows(p_v + o_y, b_v, m_rows, D, BLOCK_H)
        store_rows(p_v_dot + o_y, b_v_dot, m_rows, D, BLOCK_H)
        _store_value_and_tangent(
            p_q, p_q_dot, o_y, b_qa, b_qb, b_qa_dot, b_qb_dot, b_wqa, b_wqb, b_wqa_dot, b_wqb_dot,
            b_cos, b_sin, m_rows, eps, D, BLOCK_H, INTERLEAVED, ROPE, p_qkv_dot is not None,
            p_q_weight_dot is not None,
        )  # fmt: skip
        _store_value_and_tangent(
            p_k, p_k_dot, o_y, b_ka, b_kb, b_ka_dot, b_kb_dot, b_wka, b_wkb, b_wka_dot, b_wkb_dot,
            b_cos, b_sin, m_rows, eps, D, BLOCK_H, INTERLEAVED, ROPE, p_qkv_dot is not None,
            p_k_weight_dot is not None,
        )  # fmt: skip
