# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of attention's value."""

import triton
import triton.language as tl

from disca_kernels.ops.attention.triton_blocks import (
    LN_2,
    LOG2_E,
    key_limits,
    key_range,
    load_rows,
    program,
    store_dense,
)


@triton.jit
def _attention_fwd_kernel(
    q, k, v, p_o, p_rest, p_lse, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, H, GROUP, NQ, NK, block, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale Q K^T) V by the online softmax, its log-sum-exp, and what O rounds away.

    The key blocks that every query of the tile sees whole come first, without a mask; those that
    cross a limit follow (TAIL). NEGATIVE is the sign of scale, which the row maximum needs to know
    so that multiplying by scale folds into the exponent.
    """
    first, i_b, i_h, n_keys = program(p_lengths, H, NQ, NK, BLOCK_M, CAUSAL)
    begin, stop = key_range(first, n_keys, NQ, NK, block, BLOCK_M, BLOCK_N, CAUSAL)
    i_hk = i_h // GROUP
    o_m, o_n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b_limit = key_limits(o_m, n_keys, NQ, NK, block, CAUSAL)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(
        q, i_b, i_h, first, NQ, stride_qb, stride_qh, stride_qn, D, BLOCK_M, BLOCK_D, TMA, TMA
    )
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    for TAIL in tl.static_range(2):
        for start in tl.range(
            begin if TAIL else 0, stop if TAIL else begin, BLOCK_N, disable_licm=TMA and TAIL
        ):
            # [BLOCK_N, BLOCK_D]
            b_k = load_rows(
                k, i_b, i_hk, start, n_keys, stride_kb, stride_kh, stride_kn,
                D, BLOCK_N, BLOCK_D, TMA, TMA or not TAIL,
            )  # fmt: skip
            # [BLOCK_M, BLOCK_N]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if TAIL:
                b_s = tl.where(
                    (start + o_n)[None, :] < b_limit[:, None], b_s * factor, -float("inf")
                )
                m_new = tl.maximum(b_m, tl.max(b_s, 1))
                # A row that has seen no key yet: -inf - -inf must not become NaN.
                base = tl.where(m_new == -float("inf"), 0.0, m_new)
                b_p = tl.exp2(b_s - base[:, None])
            else:
                m_new = tl.maximum(b_m, factor * (tl.min(b_s, 1) if NEGATIVE else tl.max(b_s, 1)))
                base = m_new
                b_p = tl.exp2(b_s * factor - m_new[:, None])
            alpha = tl.exp2(b_m - base)
            b_l = b_l * alpha + tl.sum(b_p, 1)
            b_m = m_new
            # [BLOCK_N, BLOCK_D]
            b_v = load_rows(
                v, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                D, BLOCK_N, BLOCK_D, TMA, not TAIL,
            )  # fmt: skip
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * alpha[:, None], input_precision="ieee")
    row = (i_b * H + i_h) * NQ + first
    b_seen = b_l != 0
    total = tl.where(b_seen, b_l, 1.0)
    b_lse = tl.where(b_seen, (b_m + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(p_lse + row + tl.arange(0, BLOCK_M), b_lse, mask=o_m < NQ)
    b_o = b_o / total[:, None]
    store_dense(p_o, b_o, row, NQ - first, D, BLOCK_M, BLOCK_D)
    if p_rest is not None:
        b_rest = b_o - b_o.to(p_o.dtype.element_ty).to(tl.float32)
        store_dense(p_rest, b_rest, row, NQ - first, D, BLOCK_M, BLOCK_D)
