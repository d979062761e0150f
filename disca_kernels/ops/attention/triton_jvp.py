# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of attention's value and tangent in one pass."""

import triton
import triton.language as tl

from disca_kernels.ops.attention.triton_blocks import (
    LN_2,
    LOG2_E,
    key_limits,
    key_range,
    load_rows,
    program,
    scores_dot,
    store_dense,
)


@triton.jit
def _attention_jvp_kernel(
    q, k, v, q_dot, k_dot, v_dot, p_o, p_lse, p_o_dot, p_lse_dot, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, H, GROUP, NQ, NK, block, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """O and O_dot with two accumulators, the scores' tangent centred as it runs.

    `b_c` is the mean of S_dot over the keys seen so far, weighted by P. `b_t` accumulates
    W V + P V_dot with W = P * (S_dot - c); when a block moves c, the part already summed is
    corrected by (c_old - c_new) O. All that is left to subtract at the end is r O: r = rowsum(W)
    would be 0 but for the rounding of W for its product, whose error then meets V - O alone. `b_lr`
    is the sum of P as rounded for its products. A tangent passed as None is 0 and costs nothing.
    """
    first, i_b, i_h, n_keys = program(p_lengths, H, NQ, NK, BLOCK_M, CAUSAL)
    begin, stop = key_range(first, n_keys, NQ, NK, block, BLOCK_M, BLOCK_N, CAUSAL)
    i_hk = i_h // GROUP
    o_m, o_n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b_limit = key_limits(o_m, n_keys, NQ, NK, block, CAUSAL)
    HAS_S_DOT: tl.constexpr = (q_dot is not None) or (k_dot is not None)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(
        q, i_b, i_h, first, NQ, stride_qb, stride_qh, stride_qn, D, BLOCK_M, BLOCK_D, TMA, TMA
    )
    b_q_dot = None
    if q_dot is not None:
        b_q_dot = load_rows(
            q_dot, i_b, i_h, first, NQ, stride_qb, stride_qh, stride_qn,
            D, BLOCK_M, BLOCK_D, TMA, TMA,
        )  # fmt: skip
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_c = tl.zeros([BLOCK_M], tl.float32)
    b_r = tl.zeros([BLOCK_M], tl.float32)
    b_lr = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_t = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            if HAS_S_DOT:
                b_k_dot = None
                if k_dot is not None:
                    b_k_dot = load_rows(
                        k_dot, i_b, i_hk, start, n_keys, stride_kb, stride_kh, stride_kn,
                        D, BLOCK_N, BLOCK_D, TMA, TMA or not TAIL,
                    )  # fmt: skip
                b_h = scores_dot(b_q, b_q_dot, b_k, b_k_dot, BLOCK_M, BLOCK_N)
            if TAIL:
                b_seen = (start + o_n)[None, :] < b_limit[:, None]
                b_s = tl.where(b_seen, b_s * factor, -float("inf"))
                if HAS_S_DOT:
                    b_h = tl.where(b_seen, b_h, 0.0)
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
            b_o *= alpha[:, None]
            b_t *= alpha[:, None]
            # [BLOCK_N, BLOCK_D]
            b_v = load_rows(
                v, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                D, BLOCK_N, BLOCK_D, TMA, not TAIL,
            )  # fmt: skip
            b_w = b_p.to(b_v.dtype)
            b_r *= alpha
            b_lr *= alpha
            if HAS_S_DOT:
                b_h = b_p * (b_h * scale - b_c[:, None])
                moved = tl.sum(b_h, 1) / tl.where(b_l > 0, b_l, 1.0)
                b_h = (b_h - b_p * moved[:, None]).to(b_v.dtype)
                b_c += moved
                b_t -= moved[:, None] * b_o
                b_r += tl.sum(b_h.to(tl.float32), 1) - moved * b_lr
                b_lr += tl.sum(b_w.to(tl.float32), 1)
                b_t = tl.dot(b_h, b_v, b_t, input_precision="ieee")
            b_o = tl.dot(b_w, b_v, b_o, input_precision="ieee")
            if v_dot is not None:
                b_v_dot = load_rows(
                    v_dot, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                    D, BLOCK_N, BLOCK_D, TMA, not TAIL,
                )  # fmt: skip
                b_t = tl.dot(b_w, b_v_dot, b_t, input_precision="ieee")
    row = (i_b * H + i_h) * NQ + first
    o_row, m_m = row + tl.arange(0, BLOCK_M), o_m < NQ
    total = tl.where(b_l != 0, b_l, 1.0)
    b_lse = tl.where(b_l != 0, (b_m + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(p_lse + o_row, b_lse, mask=m_m)
    tl.store(p_lse_dot + o_row, b_c, mask=m_m)
    store_dense(p_o, b_o / total[:, None], row, NQ - first, D, BLOCK_M, BLOCK_D)
    if HAS_S_DOT:
        b_t -= (b_r / tl.where(b_lr > 0, b_lr, 1.0))[:, None] * b_o
    store_dense(p_o_dot, b_t / total[:, None], row, NQ - first, D, BLOCK_M, BLOCK_D)
