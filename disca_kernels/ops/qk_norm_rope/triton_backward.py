# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the gradients of query-key normalisation with rotary embedding."""

import triton
import triton.language as tl

from disca_kernels.ops.qk_norm_rope.triton_blocks import (
    load_angles,
    load_pairs,
    load_pairs_or_zeros,
    load_rows,
    load_weight,
    normalise,
    store_pairs,
    store_rows,
)


@triton.jit
def _store_gradient(
    p_dx, o_dx, b_ga, b_gb, b_xa, b_xb, b_wa, b_wb, b_dwa, b_dwb, b_cos, b_sin, m_rows, eps,
    D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, ROPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one head's rows of queries or keys; add that of the weight.

    With g the cotangent turned back and h = g * weight,
    `dx = rstd * (h - x_hat * mean(h * x_hat))`.
    """
    b_xa, b_xb, b_rstd = normalise(b_xa, b_xb, D, eps)
    if ROPE:
        b_turned = b_ga * b_cos + b_gb * b_sin
        b_gb = b_gb * b_cos - b_ga * b_sin
        b_ga = b_turned
    if WEIGHTED:
        b_dwa += b_ga * b_xa
        b_dwb += b_gb * b_xb
    if p_dx is not None:
        b_ga *= b_wa
        b_gb *= b_wb
        b_along = tl.sum(b_ga * b_xa + b_gb * b_xb, axis=1, keep_dims=True) / D
        b_dxa = b_rstd * (b_ga - b_xa * b_along)
        b_dxb = b_rstd * (b_gb - b_xb * b_along)
        store_pairs(p_dx + o_dx, b_dxa, b_dxb, m_rows, D, BLOCK_H, INTERLEAVED)
    return b_dwa, b_dwb


@triton.jit
def _store_sums(
    p_sums, b_a, b_b, D: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store the sums over the rows of pairs as row `program` of [programs, D]."""
    # [1, 1]
    o_row = tl.zeros([1, 1], tl.int64) + tl.program_id(0)
    b_a, b_b = tl.sum(b_a, axis=0, keep_dims=True), tl.sum(b_b, axis=0, keep_dims=True)
    store_pairs(p_sums + o_row * D, b_a, b_b, o_row >= 0, D, BLOCK_H, INTERLEAVED)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    p_dq,
    p_dk,
    p_dv,
    p_qkv,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_dqkv,
    p_dq_weight,
    p_dk_weight,
    N,
    H,
    rope_tokens,
    eps,
    n_tasks,
    tasks_per_split,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_xb,
    stride_xn,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write the packed gradient of one split of all samples' tokens and of HEADS heads.

    Sums of the weights' gradients go to row `program` of [programs, D]. A gradient whose pointer is
    None is not computed; a cotangent whose pointer is None is zero.
    """
    ROPE: tl.constexpr = p_cos is not None
    n_groups = tl.cdiv(H, HEADS)
    n_tiles = tl.cdiv(N, BLOCK_N)
    first = (tl.program_id(0) % n_groups).to(tl.int64) * HEADS
    start = tl.program_id(0) // n_groups * tasks_per_split
    b_wqa, b_wqb = load_weight(p_q_weight, D, BLOCK_H, INTERLEAVED)
    b_wka, b_wkb = load_weight(p_k_weight, D, BLOCK_H, INTERLEAVED)
    b_dwqa = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    b_dwqb, b_dwka, b_dwkb = b_dwqa, b_dwqa, b_dwqa
    for i_task in range(start, tl.minimum(start + tasks_per_split, n_tasks)):
        i_b = tl.zeros([1, 1], tl.int64) + i_task // n_tiles
        o_n = tl.zeros([1], tl.int64) + i_task % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        b_cos, b_sin = load_angles(p_cos, p_sin, o_n, rope_tokens, D, BLOCK_H)
        for i in range(HEADS):
            i_h = first + i
            # [BLOCK_N, 1]
            m_rows = (o_n < tl.where(i_h < H, N, 0))[:, None]
            o_rows = o_n[:, None]
            o_x = i_b * stride_xb + i_h * D + o_rows * stride_xn
            o_dx = ((i_b * N + o_rows) * 3 * H + i_h) * D
            o_dq = i_b * stride_qb + i_h * stride_qh + o_rows * stride_qn
            o_dk = i_b * stride_kb + i_h * stride_kh + o_rows * stride_kn
            # All loads come before the first store, which the compiler cannot move them across.
            b_qa, b_qb = load_pairs(p_qkv + o_x, m_rows, D, BLOCK_H, INTERLEAVED)
            b_ka, b_kb = load_pairs(p_qkv + o_x + H * D, m_rows, D, BLOCK_H, INTERLEAVED)
            b_dqa, b_dqb = load_pairs_or_zeros(p_dq, o_dq, m_rows, D, BLOCK_H, INTERLEAVED)
            b_dka, b_dkb = load_pairs_or_zeros(p_dk, o_dk, m_rows, D, BLOCK_H, INTERLEAVED)
            if p_dqkv is not None:
                o_dv = i_b * stride_vb + i_h * stride_vh + o_rows * stride_vn
                b_dv = load_rows(p_dv, o_dv, p_dqkv, m_rows, D, BLOCK_H)
                store_rows(p_dqkv + o_dx + 2 * H * D, b_dv, m_rows, D, BLOCK_H)
            b_dwqa, b_dwqb = _store_gradient(
                p_dqkv, o_dx, b_dqa, b_dqb, b_qa, b_qb, b_wqa, b_wqb, b_dwqa, b_dwqb, b_cos, b_sin,
                m_rows, eps, D, BLOCK_H, INTERLEAVED, ROPE, p_dq_weight is not None,
            )  # fmt: skip
            b_dwka, b_dwkb = _store_gradient(
                p_dqkv, o_dx + H * D, b_dka, b_dkb, b_ka, b_kb, b_wka, b_wkb, b_dwka, b_dwkb, b_cos,
                b_sin, m_rows, eps, D, BLOCK_H, INTERLEAVED, ROPE, p_dk_weight is not None,
            )  # fmt: skip
    if p_dq_weight is not None:
        _store_sums(p_dq_weight, b_dwqa, b_dwqb, D, BLOCK_H, INTERLEAVED)
    if p_dk_weight is not None:
        _store_sums(p_dk_weight, b_dwka, b_dwkb, D, BLOCK_H, INTERLEAVED)
