# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of attention's tangent alone, on top of a value that is already there."""

import triton
import triton.language as tl

from disca_kernels.ops.attention.triton_blocks import (
    LOG2_E,
    key_limits,
    key_range,
    load_rows,
    program,
    scores_dot,
    store_dense,
)

# A tile is computed again when its centre missed the mean of some row's S_dot by more than TAU
# times their spread, and what the miss multiplies, |O|, is more than 1 / KAPPA of |O_dot|.
TAU = tl.constexpr(1.0)
KAPPA = tl.constexpr(1.0)


@triton.jit
def _sample(i_pass, begin, stop, BLOCK_N: tl.constexpr):
    """Return the step through the whole blocks of keys, and where the others end.

    Pass 0 reads every 32nd block, but at least the first and at most four, spread evenly. The
    first keys alone may be unlike the others: text before video.
    """
    blocks = begin // BLOCK_N
    wanted = tl.minimum(tl.maximum(blocks // 32, 1), 4)
    step = tl.where(i_pass == 0, tl.maximum(tl.cdiv(blocks, wanted), 1), 1) * BLOCK_N
    first = tl.where(blocks > 0, begin, tl.minimum(stop, BLOCK_N))
    return step, tl.where(i_pass == 0, first, stop)


@triton.jit
def _misses(delta, m2, b_o, b_o_dot, EXACT_O: tl.constexpr):
    """Return for each row whether its centre is too far off."""
    square = delta * delta
    missed = square * tl.sum(b_o * b_o, 1) > KAPPA * KAPPA * tl.sum(b_o_dot * b_o_dot, 1)
    if EXACT_O:
        missed = missed & (square > TAU * TAU * tl.maximum(m2 - square, 0.0))
    return missed


@triton.jit
def _attention_tangent_kernel(
    q, k, v, q_dot, k_dot, v_dot, o, rest, p_lse, p_o_dot, p_lse_dot, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, H, GROUP, NQ, NK, block, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EXACT_O: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """O_dot with one accumulator: P is exact from the log-sum-exp, so that nothing is rescaled.

    `b_c` centres S_dot from the start: its mean over a few blocks of keys (`_sample`), weighted by
    P. The pass sums `b_m1`, what the mean of S_dot over all keys differs from c by, and, beside
    b_t = W V + P V_dot with W = P * (S_dot - c) as rounded for the product, `b_r` = rowsum(W). Then
    O_dot = b_t - r O: an error of W meets V - O alone. If c was too far off for some row of the
    tile (`_misses`), the tile is computed once more around c + m1.
    """
    first, i_b, i_h, n_keys = program(p_lengths, H, NQ, NK, BLOCK_M, CAUSAL)
    begin, stop = key_range(first, n_keys, NQ, NK, block, BLOCK_M, BLOCK_N, CAUSAL)
    i_hk = i_h // GROUP
    o_m, o_n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b_limit = key_limits(o_m, n_keys, NQ, NK, block, CAUSAL)
    row = (i_b * H + i_h) * NQ + first
    o_row, m_m = row + tl.arange(0, BLOCK_M), o_m < NQ
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
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=-float("inf")) * LOG2_E
    # A row that sees no key weighs every key with exp2(-inf) = 0.
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse)
    # Weights below 2^-14 would lose bits in float16, so there they are 16 times as large.
    UNIT: tl.constexpr = 16.0 if b_q.dtype == tl.float16 else 1.0
    b_lse -= 4.0 if b_q.dtype == tl.float16 else 0.0
    b_c = tl.zeros([BLOCK_M], tl.float32)
    factor = scale * LOG2_E
    stride_ob = tl.cast(H, tl.int64) * NQ * D
    again = 1
    # Three passes in one loop, not in a prologue and a `while`: the compiler would hoist more
    # addresses out of those than the registers can hold.
    for i_pass in tl.range(0 if HAS_S_DOT else 1, 3, num_stages=1, disable_licm=True):
        if again > 0:
            step, end = BLOCK_N, stop
            if HAS_S_DOT:
                step, end = _sample(i_pass, begin, stop, BLOCK_N)
            b_t = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            b_m1 = tl.zeros([BLOCK_M], tl.float32)
            b_m2 = tl.zeros([BLOCK_M], tl.float32)
            b_r = tl.zeros([BLOCK_M], tl.float32)
            b_l = tl.zeros([BLOCK_M], tl.float32)
            for TAIL in tl.static_range(2):
                for start in tl.range(
                    begin if TAIL else 0,
                    end if TAIL else begin,
                    BLOCK_N if TAIL else step,
                    disable_licm=TMA and TAIL,
                ):
                    # [BLOCK_N, BLOCK_D]
                    b_k = load_rows(
                        k, i_b, i_hk, start, n_keys, stride_kb, stride_kh, stride_kn,
                        D, BLOCK_N, BLOCK_D, TMA, TMA or not TAIL,
                    )  # fmt: skip
                    # [BLOCK_M, BLOCK_N]
                    b_s = (
                        tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor - b_lse[:, None]
                    )
                    b_seen = (start + o_n)[None, :] < b_limit[:, None]
                    if TAIL:
                        b_s = tl.where(b_seen, b_s, -float("inf"))
                    b_p = tl.exp2(b_s)
                    if HAS_S_DOT:
                        b_k_dot = None
                        if k_dot is not None:
                            b_k_dot = load_rows(
                                k_dot, i_b, i_hk, start, n_keys, stride_kb, stride_kh, stride_kn,
                                D, BLOCK_N, BLOCK_D, TMA, TMA or not TAIL,
                            )  # fmt: skip
                        b_h = scores_dot(b_q, b_q_dot, b_k, b_k_dot, BLOCK_M, BLOCK_N)
                        b_h = b_h * scale - b_c[:, None]
                        if TAIL:
                            b_h = tl.where(b_seen, b_h, 0.0)
                        b_l += tl.sum(b_p, 1)
                        b_w = b_p * b_h
                        b_m1 += tl.sum(b_w, 1)
                        b_m2 += tl.sum(b_w * b_h, 1)
                        # [BLOCK_N, BLOCK_D]
                        b_v = load_rows(
                            v, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                            D, BLOCK_N, BLOCK_D, TMA, not TAIL,
                        )  # fmt: skip
                        b_w = b_w.to(b_v.dtype)
                        b_r += tl.sum(b_w.to(tl.float32), 1)
                        b_t = tl.dot(b_w, b_v, b_t, input_precision="ieee")
                    if v_dot is not None:
                        b_v_dot = load_rows(
                            v_dot, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                            D, BLOCK_N, BLOCK_D, TMA, not TAIL,
                        )  # fmt: skip
                        b_t = tl.dot(b_p.to(b_v_dot.dtype), b_v_dot, b_t, input_precision="ieee")
            if i_pass == 0:
                b_c = b_m1 / tl.where(b_l > 0, b_l, 1.0)
            else:
                again = 0
                b_t *= 1.0 / UNIT
                if HAS_S_DOT:
                    b_r *= 1.0 / UNIT
                    b_m1 *= 1.0 / UNIT
                    b_m2 *= 1.0 / UNIT
                    # Read as the operands are: a descriptor's tile goes from shared memory straight
                    # to where the accumulator's elements lie, without more registers on the way.
                    if rest is not None:
                        b_rest = load_rows(
                            rest, i_b, i_h, first, NQ, stride_ob, NQ * D, D,
                            D, BLOCK_M, BLOCK_D, TMA, TMA,
                        )  # fmt: skip
                        b_t -= b_r[:, None] * b_rest.to(tl.float32)
                    b_o = load_rows(
                        o, i_b, i_h, first, NQ, stride_ob, NQ * D, D,
                        D, BLOCK_M, BLOCK_D, TMA, TMA,
                    ).to(tl.float32)  # fmt: skip
                    b_t -= b_r[:, None] * b_o
                    missed = _misses(b_m1, b_m2, b_o, b_t, EXACT_O)
                    # Through [1, BLOCK_M], since Triton 3.6 fails for 10.0 if a vector that comes
                    # from an accumulator is reduced directly.
                    again = tl.max(tl.max(missed.to(tl.int32)[None, :], 1), 0)
                    b_c += b_m1
                # In every pass: an accumulator that outlived the loop would cost its registers.
                tl.store(p_lse_dot + o_row, b_c, mask=m_m)
                store_dense(p_o_dot, b_t, row, NQ - first, D, BLOCK_M, BLOCK_D)
