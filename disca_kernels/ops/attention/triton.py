# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of attention (value, gradient, value with tangent) and their launchers.

A tensor of [B, H, N, D] is addressed by the strides of its first three dimensions; the last one is
contiguous. Keys and values outside a sequence are read as 0, never as what the memory holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.ops.attention.layout import dense, paired, rows, strides
from disca_kernels.ops.attention.tiles import Tile, padded_dim, tiles

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(p, stride, o_r, o_d, rows, D: tl.constexpr):
    """Read rows of D elements, 0 beyond `rows` and D: [len(o_r), len(o_d)]."""
    m = (o_r < rows)[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_r[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@triton.jit
def _store_rows(p, b, o_r, o_d, rows, D: tl.constexpr):
    """Write rows of D elements to contiguous memory in its dtype."""
    m = (o_r < rows)[:, None] & (o_d < D)[None, :]
    tl.store(p + o_r[:, None] * D + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _program(p_lengths, H, N, NK, BLOCK: tl.constexpr):
    """Return the first row of this program's block, its sample, its head, and the valid keys."""
    blocks = tl.cdiv(N, BLOCK)
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    n_keys = NK
    if p_lengths is not None:
        n_keys = tl.minimum(tl.maximum(tl.load(p_lengths + i_bh // H), 0), NK).to(tl.int32)
    return first, i_bh // H, i_bh % H, n_keys


@triton.jit
def _visible(o_m, o_n, n_keys, NQ, NK, CAUSAL: tl.constexpr):
    """Return which of these keys these queries see: [len(o_m), len(o_n)]."""
    m = (o_n < n_keys)[None, :] & (o_m < NQ)[:, None]
    if CAUSAL:
        m = m & (o_n[None, :] <= o_m[:, None] + (NK - NQ))
    return m


@triton.jit
def _key_stop(first, n_keys, NQ, NK, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the end of the keys that the queries first .. first + BLOCK_M may see."""
    if CAUSAL:
        return tl.minimum(n_keys, first + BLOCK_M + (NK - NQ))
    return n_keys


@triton.jit
def _attention_fwd_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, H, NQ, NK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale Q K^T) V by the online softmax; lse is the log-sum-exp in base 2."""
    first, i_b, i_h, n_keys = _program(p_lengths, H, NQ, NK, BLOCK_M)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_q += i_b * stride_qb + i_h * stride_qh + first.to(tl.int64) * stride_qn
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    # [BLOCK_M, BLOCK_D]
    b_q = _load_rows(p_q, stride_qn, o_m, o_d, NQ - first, D)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, _key_stop(first, n_keys, NQ, NK, BLOCK_M, CAUSAL), BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        b_k = _load_rows(p_k, stride_kn, o_n, o_d, n_keys - start, D)
        b_v = _load_rows(p_v, stride_vn, o_n, o_d, n_keys - start, D)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        m_s = _visible(first + o_m, start + o_n, n_keys, NQ, NK, CAUSAL)
        b_s = tl.where(m_s, b_s, -float("inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen no key yet: -inf - -inf must not become NaN.
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(b_m - base)
        b_p = tl.exp2(b_s - base[:, None])
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * alpha[:, None], input_precision="ieee")
        b_m = m_new
        p_k += BLOCK_N * stride_kn
        p_v += BLOCK_N * stride_vn
    row = (i_b * H + i_h) * NQ + first
    b_o = b_o / tl.where(b_l > 0, b_l, 1.0)[:, None]
    _store_rows(p_o + row * D, b_o, o_m, o_d, NQ - first, D)
    b_lse = tl.where(b_l > 0, b_m + tl.log2(tl.where(b_l > 0, b_l, 1.0)), -float("inf"))
    tl.store(p_lse + row + o_m, b_lse, mask=o_m < NQ - first)


@triton.jit
def _attention_jvp_kernel(
    p_q, p_k, p_v, p_q_dot, p_k_dot, p_v_dot, p_o, p_lse, p_o_dot, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, H, NQ, NK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KNOWN_LSE: tl.constexpr,
):  # fmt: skip
    """O and O_dot in one pass with two accumulators, the scores' tangent centred as it runs.

    `b_c` is the mean of S_dot over the keys seen so far, weighted by P. `b_t` accumulates
    (P * (S_dot - c)) V + P V_dot; when a block moves c, the part already summed is corrected by
    (c_old - c_new) O, so that nothing is left to subtract at the end (docs/ops/attention.md).
    A tangent passed as None is 0 and costs nothing. KNOWN_LSE reads lse and stores only O_dot.
    """
    first, i_b, i_h, n_keys = _program(p_lengths, H, NQ, NK, BLOCK_M)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    HAS_S_DOT: tl.constexpr = (p_q_dot is not None) or (p_k_dot is not None)
    o_q = i_b * stride_qb + i_h * stride_qh + first.to(tl.int64) * stride_qn
    o_k = i_b * stride_kb + i_h * stride_kh
    o_v = i_b * stride_vb + i_h * stride_vh
    row = (i_b * H + i_h) * NQ + first
    # [BLOCK_M, BLOCK_D]
    b_q = _load_rows(p_q + o_q, stride_qn, o_m, o_d, NQ - first, D)
    if p_q_dot is not None:
        b_q_dot = _load_rows(p_q_dot + o_q, stride_qn, o_m, o_d, NQ - first, D)
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if KNOWN_LSE:
        b_m = tl.load(p_lse + row + o_m, mask=o_m < NQ - first, other=0.0)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_c = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_t = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, _key_stop(first, n_keys, NQ, NK, BLOCK_M, CAUSAL), BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        b_k = _load_rows(p_k + o_k, stride_kn, o_n, o_d, n_keys - start, D)
        b_v = _load_rows(p_v + o_v, stride_vn, o_n, o_d, n_keys - start, D)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        m_s = _visible(first + o_m, start + o_n, n_keys, NQ, NK, CAUSAL)
        b_s = tl.where(m_s, b_s, -float("inf"))
        m_new = b_m
        if not KNOWN_LSE:
            m_new = tl.maximum(b_m, tl.max(b_s, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        b_p = tl.exp2(b_s - base[:, None])
        if not KNOWN_LSE:
            alpha = tl.exp2(b_m - base)
            b_l *= alpha
            b_o *= alpha[:, None]
            b_t *= alpha[:, None]
            b_m = m_new
        b_l += tl.sum(b_p, 1)
        if HAS_S_DOT:
            b_s_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if p_q_dot is not None:
                b_s_dot = tl.dot(b_q_dot, tl.trans(b_k), b_s_dot, input_precision="ieee")
            if p_k_dot is not None:
                b_k_dot = _load_rows(p_k_dot + o_k, stride_kn, o_n, o_d, n_keys - start, D)
                b_s_dot = tl.dot(b_q, tl.trans(b_k_dot), b_s_dot, input_precision="ieee")
            b_h = b_s_dot * scale - b_c[:, None]
            moved = tl.sum(b_p * b_h, 1) / tl.where(b_l > 0, b_l, 1.0)
            b_h = b_p * (b_h - moved[:, None])
            b_c += moved
            b_t -= moved[:, None] * b_o
            b_t = tl.dot(b_h.to(b_v.dtype), b_v, b_t, input_precision="ieee")
        if p_v_dot is not None:
            b_v_dot = _load_rows(p_v_dot + o_v, stride_vn, o_n, o_d, n_keys - start, D)
            b_t = tl.dot(b_p.to(b_v.dtype), b_v_dot, b_t, input_precision="ieee")
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        o_k += BLOCK_N * stride_kn
        o_v += BLOCK_N * stride_vn
    total = tl.where(b_l > 0, b_l, 1.0)
    _store_rows(p_o_dot + row * D, b_t / total[:, None], o_m, o_d, NQ - first, D)
    if not KNOWN_LSE:
        _store_rows(p_o + row * D, b_o / total[:, None], o_m, o_d, NQ - first, D)
        b_lse = tl.where(b_l > 0, b_m + tl.log2(total), -float("inf"))
        tl.store(p_lse + row + o_m, b_lse, mask=o_m < NQ - first)


@triton.jit
def _attention_bwd_kernel_dq(
    p_q, p_k, p_v, p_o, p_lse, p_do, p_dq, p_delta, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn, H, NQ, NK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute dQ = scale dS K, dS = P * (dO V^T - delta), and store delta = rowsum(dO * O)."""
    first, i_b, i_h, n_keys = _program(p_lengths, H, NQ, NK, BLOCK_M)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_q += i_b * stride_qb + i_h * stride_qh + first.to(tl.int64) * stride_qn
    p_do += i_b * stride_db + i_h * stride_dh + first.to(tl.int64) * stride_dn
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    row = (i_b * H + i_h) * NQ + first
    # [BLOCK_M, BLOCK_D]
    b_q = _load_rows(p_q, stride_qn, o_m, o_d, NQ - first, D)
    b_do = _load_rows(p_do, stride_dn, o_m, o_d, NQ - first, D)
    b_o = _load_rows(p_o + row * D, D, o_m, o_d, NQ - first, D)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + row + o_m, b_delta, mask=o_m < NQ - first)
    b_lse = tl.load(p_lse + row + o_m, mask=o_m < NQ - first, other=float("inf"))
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, _key_stop(first, n_keys, NQ, NK, BLOCK_M, CAUSAL), BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        b_k = _load_rows(p_k, stride_kn, o_n, o_d, n_keys - start, D)
        b_v = _load_rows(p_v, stride_vn, o_n, o_d, n_keys - start, D)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        m_s = _visible(first + o_m, start + o_n, n_keys, NQ, NK, CAUSAL)
        b_p = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        p_k += BLOCK_N * stride_kn
        p_v += BLOCK_N * stride_vn
    _store_rows(p_dq + row * D, b_dq * scale, o_m, o_d, NQ - first, D)


@triton.jit
def _attention_bwd_kernel_dkdv(
    p_q, p_k, p_v, p_lse, p_delta, p_do, p_dk, p_dv, p_lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn, H, NQ, NK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute dV = P^T dO and dK = scale dS^T Q of one block of keys."""
    first, i_b, i_h, n_keys = _program(p_lengths, H, NK, NK, BLOCK_N)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(first - (NK - NQ), 0) // BLOCK_M * BLOCK_M
    # Beyond the valid keys there is nothing to sum: their gradients are stored as 0.
    stop = tl.where(first < n_keys, NQ, 0)
    p_k += i_b * stride_kb + i_h * stride_kh + first.to(tl.int64) * stride_kn
    p_v += i_b * stride_vb + i_h * stride_vh + first.to(tl.int64) * stride_vn
    skipped = tl.cast(begin, tl.int64)
    p_q += i_b * stride_qb + i_h * stride_qh + skipped * stride_qn
    p_do += i_b * stride_db + i_h * stride_dh + skipped * stride_dn
    p_lse += (i_b * H + i_h) * NQ
    p_delta += (i_b * H + i_h) * NQ
    # [BLOCK_N, BLOCK_D]
    b_k = _load_rows(p_k, stride_kn, o_n, o_d, n_keys - first, D)
    b_v = _load_rows(p_v, stride_vn, o_n, o_d, n_keys - first, D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, stop, BLOCK_M):
        # [BLOCK_M, BLOCK_D]
        b_q = _load_rows(p_q, stride_qn, o_m, o_d, NQ - start, D)
        b_do = _load_rows(p_do, stride_dn, o_m, o_d, NQ - start, D)
        m_m = o_m < NQ - start
        b_lse = tl.load(p_lse + start + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + start + o_m, mask=m_m, other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        m_s = _visible(start + o_m, first + o_n, n_keys, NQ, NK, CAUSAL)
        b_p = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dv = tl.dot(tl.trans(b_p).to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dk = tl.dot(tl.trans(b_ds).to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        p_q += BLOCK_M * stride_qn
        p_do += BLOCK_M * stride_dn
    row = (i_b * H + i_h) * NK + first
    _store_rows(p_dk + row * D, b_dk * scale, o_n, o_d, NK - first, D)
    _store_rows(p_dv + row * D, b_dv, o_n, o_d, NK - first, D)


def _constants(tile: Tile, head_dim: int, causal: bool) -> dict[str, int | bool]:
    return {
        "D": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o of [B, H, Nq, D] and the float32 log-sum-exp of the scores in base 2, [B, H, Nq]."""
    batch, heads, n_q, dim = q.shape
    q, k, v, kv_lengths = rows(q), rows(k), rows(v), dense(kv_lengths)
    o = torch.empty((batch, heads, n_q, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    tile = tiles(q.device, dim, q.element_size()).fwd
    if o.numel():
        _attention_fwd_kernel[(triton.cdiv(n_q, tile.block_m) * batch * heads,)](
            q, k, v, o, lse, kv_lengths, *strides(q, k, v), heads, n_q, k.shape[2], scale,
            **_constants(tile, dim, causal),
        )  # fmt: skip
    return o, lse


def _launch_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    lse: Tensor | None,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the value-with-tangent kernel; a known lse leaves the value unwritten."""
    batch, heads, n_q, dim = primals[0].shape
    (q, q_dot), (k, k_dot), (v, v_dot) = map(paired, primals, tangents)
    kv_lengths, lse = dense(kv_lengths), dense(lse)
    o_dot = torch.empty((batch, heads, n_q, dim), dtype=q.dtype, device=q.device)
    o = o_dot if lse is not None else torch.empty_like(o_dot)
    out_lse = lse
    if out_lse is None:
        out_lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    tile = tiles(q.device, dim, q.element_size()).jvp
    if o.numel():
        _attention_jvp_kernel[(triton.cdiv(n_q, tile.block_m) * batch * heads,)](
            q, k, v, q_dot, k_dot, v_dot, o, out_lse, o_dot, kv_lengths,
            *strides(q, k, v), heads, n_q, k.shape[2], scale,
            KNOWN_LSE=lse is not None, **_constants(tile, dim, causal),
        )  # fmt: skip
    return o, out_lse, o_dot


def launch_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o and lse as `launch_fwd` does, and o_dot, from one pass over the keys."""
    return _launch_jvp(primals, tangents, None, kv_lengths, causal, scale)


def launch_tangent(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    lse: Tensor,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return o_dot alone, given the log-sum-exp of an earlier forward pass."""
    return _launch_jvp(primals, tangents, lse, kv_lengths, causal, scale)[2]


def launch_bwd(
    do: Tensor,
    primals: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, recomputing P from the log-sum-exp."""
    do, q, k, v = rows(do), *map(rows, primals)
    o, lse, kv_lengths = dense(o), dense(lse), dense(kv_lengths)
    batch, heads, n_q, dim = q.shape
    n_k = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    _, _, dq_tile, dkdv_tile = tiles(q.device, dim, q.element_size())
    layout = (*strides(q, k, v, do), heads, n_q, n_k, scale)
    if dq.numel():
        _attention_bwd_kernel_dq[(triton.cdiv(n_q, dq_tile.block_m) * batch * heads,)](
            q, k, v, o, lse, do, dq, delta, kv_lengths, *layout,
            **_constants(dq_tile, dim, causal),
        )  # fmt: skip
    if dk.numel():
        _attention_bwd_kernel_dkdv[(triton.cdiv(n_k, dkdv_tile.block_n) * batch * heads,)](
            q, k, v, lse, delta, do, dk, dv, kv_lengths, *layout,
            **_constants(dkdv_tile, dim, causal),
        )  # fmt: skip
    return dq, dk, dv
