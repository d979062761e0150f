# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of attention's gradients; no atomics, so that they are the same in every run."""

import triton
import triton.language as tl

from disca_kernels.ops.attention.triton_blocks import (
    LOG2_E,
    key_limits,
    key_range,
    load_dense,
    load_rows,
    program,
    store_dense,
)


@triton.jit
def _attention_bwd_kernel_dq(
    q, k, v, do, p_o, p_lse, p_dlse, p_dq, p_rows, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn,
    H, GROUP, NQ, NK, block, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute dQ = scale dS K with dS = P * (dO V^T - delta), delta = rowsum(dO * O) - dlse.

    It also stores, for the other kernel, the log-sum-exp in base 2 and delta of the rows that it
    computed, those beyond NQ included, in two halves of `p_rows`.
    """
    first, i_b, i_h, n_keys = program(p_lengths, H, NQ, NK, BLOCK_M, CAUSAL)
    begin, stop = key_range(first, n_keys, NQ, NK, block, BLOCK_M, BLOCK_N, CAUSAL)
    i_hk = i_h // GROUP
    o_m, o_n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b_limit = key_limits(o_m, n_keys, NQ, NK, block, CAUSAL)
    row = (i_b * H + i_h) * NQ + first
    o_row, m_m = row + tl.arange(0, BLOCK_M), o_m < NQ
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(
        q, i_b, i_h, first, NQ, stride_qb, stride_qh, stride_qn, D, BLOCK_M, BLOCK_D, TMA, TMA
    )
    b_do = load_rows(
        do, i_b, i_h, first, NQ, stride_db, stride_dh, stride_dn, D, BLOCK_M, BLOCK_D, TMA, TMA
    )
    b_o = load_dense(p_o, row, NQ - first, D, BLOCK_M, BLOCK_D)
    b_delta = tl.sum(b_o * b_do.to(tl.float32), 1)
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_row, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=-float("inf")) * LOG2_E
    # A row that sees no key weighs every key with exp2(-inf) = 0.
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse)
    padded = tl.cdiv(NQ, BLOCK_M) * BLOCK_M
    o_row = (i_b * H + i_h) * padded + o_m
    tl.store(p_rows + o_row, b_lse)
    tl.store(p_rows + tl.num_programs(0).to(tl.int64) * BLOCK_M + o_row, b_delta)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    for TAIL in tl.static_range(2):
        for start in tl.range(
            begin if TAIL else 0,
            stop if TAIL else begin,
            BLOCK_N,
            disable_licm=TMA and (TAIL or BLOCK_D > 128),
        ):
            # [BLOCK_N, BLOCK_D]; K multiplies dS, where 0 times what is beyond the keys must be 0.
            b_k = load_rows(
                k, i_b, i_hk, start, n_keys, stride_kb, stride_kh, stride_kn,
                D, BLOCK_N, BLOCK_D, TMA, not TAIL,
            )  # fmt: skip
            b_v = load_rows(
                v, i_b, i_hk, start, n_keys, stride_vb, stride_vh, stride_vn,
                D, BLOCK_N, BLOCK_D, TMA, TMA or not TAIL,
            )  # fmt: skip
            # [BLOCK_M, BLOCK_N]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor - b_lse[:, None]
            b_ds = tl.exp2(b_s) * (
                tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None]
            )
            if TAIL:
                b_ds = tl.where((start + o_n)[None, :] < b_limit[:, None], b_ds, 0.0)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_dense(p_dq, b_dq * scale, row, NQ - first, D, BLOCK_M, BLOCK_D)


@triton.jit
def _query_range(
    first, n_keys, NQ, NK, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return where the queries that see any of these keys begin, and those that see them all."""
    begin, whole = 0, 0
    if CAUSAL:
        begin = tl.maximum(first // block * block - (NK - NQ), 0) // BLOCK_M * BLOCK_M
        last = first + BLOCK_N - 1
        whole = tl.maximum(last // block * block - (NK - NQ), 0)
        whole = tl.cdiv(whole, BLOCK_M) * BLOCK_M
    # Keys beyond the valid ones get no gradient, and a block that holds some needs a mask.
    begin = tl.where(first < n_keys, begin, NQ)
    whole = tl.where(first + BLOCK_N <= n_keys, tl.minimum(whole, NQ), NQ)
    return begin, whole


@triton.jit
def _attention_bwd_kernel_dkdv(
    q, k, v, do, rows, p_dk, p_dv, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn,
    H, GROUP, NQ, NK, block, scale, padded, delta_offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute dV = P^T dO and dK = scale dS^T Q of one block of keys, summed over its query heads.

    Scores are kept transposed, [BLOCK_N, BLOCK_M], as the two products take them. `rows` is what
    the other kernel left, `padded` rows of each head; delta begins `delta_offset` elements later.
    """
    first, i_b, i_hk, n_keys = program(p_lengths, H // GROUP, NK, NK, BLOCK_N, False)
    begin, whole = _query_range(first, n_keys, NQ, NK, block, BLOCK_M, BLOCK_N, CAUSAL)
    o_m, o_n = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D]
    b_k = load_rows(
        k, i_b, i_hk, first, NK, stride_kb, stride_kh, stride_kn, D, BLOCK_N, BLOCK_D, TMA, TMA
    )
    b_v = load_rows(
        v, i_b, i_hk, first, NK, stride_vb, stride_vh, stride_vn, D, BLOCK_N, BLOCK_D, TMA, TMA
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    # Of each key, the first query that sees it; none sees those beyond the valid ones.
    b_first = tl.zeros([BLOCK_N], tl.int32)
    if CAUSAL:
        b_first = o_n // block * block - (NK - NQ)
    b_first = tl.where(o_n < n_keys, b_first, 0x7FFFFFFF)
    for i_h in tl.range(i_hk * GROUP, i_hk * GROUP + GROUP, num_stages=1, disable_licm=TMA):
        i_bh = i_b * H + i_h
        for WHOLE in tl.static_range(2):
            for start in tl.range(
                whole if WHOLE else begin,
                NQ if WHOLE else whole,
                BLOCK_M,
                disable_licm=TMA,
            ):
                # [BLOCK_M, BLOCK_D]
                b_q = load_rows(
                    q, i_b, i_h, start, NQ, stride_qb, stride_qh, stride_qn,
                    D, BLOCK_M, BLOCK_D, TMA, TMA,
                )  # fmt: skip
                b_do = load_rows(
                    do, i_b, i_h, start, NQ, stride_db, stride_dh, stride_dn,
                    D, BLOCK_M, BLOCK_D, TMA, TMA,
                )  # fmt: skip
                if TMA:
                    b_lse = rows.load([0, tl.cast(i_bh, tl.int32), start]).reshape(BLOCK_M)
                    b_delta = rows.load([1, tl.cast(i_bh, tl.int32), start]).reshape(BLOCK_M)
                else:
                    b_lse = tl.load(rows + i_bh * padded + start + o_m)
                    b_delta = tl.load(rows + delta_offset + i_bh * padded + start + o_m)
                # [BLOCK_N, BLOCK_M]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * factor - b_lse[None, :]
                b_seen = (start + o_m)[None, :] >= b_first[:, None]
                if not WHOLE:
                    b_s = tl.where(b_seen, b_s, -float("inf"))
                b_p = tl.exp2(b_s)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                b_ds = b_p * (b_dp - b_delta[None, :])
                if not WHOLE:
                    b_ds = tl.where(b_seen, b_ds, 0.0)
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    row = (i_b * (H // GROUP) + i_hk) * NK + first
    store_dense(p_dk, b_dk * scale, row, NK - first, D, BLOCK_N, BLOCK_D)
    store_dense(p_dv, b_dv, row, NK - first, D, BLOCK_N, BLOCK_D)
