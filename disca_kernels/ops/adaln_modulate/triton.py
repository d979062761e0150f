# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of adaptive norm modulation, and their launchers.

A program owns whole rows: it keeps them in registers, so that a row is read once however often
its mean, variance and normalised values are needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_operands, strides_of
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.modulation import (
    affine,
    affine_tangent,
    finish_gradients,
    gradient_buffers,
    modulate_tangent,
    store_modulation_gradients,
)
from disca_kernels.triton_common.rows import (
    load_channels,
    load_modulation,
    load_rows,
    normalise,
    project,
    rows_per_split,
    tile,
)

prepare_interpreter()

LIVE_ROWS = {"fwd": 3, "bwd": 6, "jvp": 5}
"""Float32 rows that a kernel keeps in registers at once."""

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]


@triton.jit
def _adaln_modulate_fwd_kernel(
    p_x,
    p_shift,
    p_scale,
    p_weight,
    p_bias,
    p_y,
    N,
    C,
    eps,
    stride_xb,
    stride_xn,
    stride_hb,
    stride_hn,
    stride_sb,
    stride_sn,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write `y = (x_hat * weight + bias) * (1 + scale) + shift` for BLOCK_N rows of one sample."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_n = (tl.program_id(0) % n_tiles).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_n = o_n < N
    m_rows = m_n[:, None] & m_c[None, :]

    b_x = load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
    b_scale = load_modulation(p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN)
    b_shift = load_modulation(p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN)
    b_x_hat, _ = normalise(b_x, m_n, m_c, C, eps, RMS)
    b_y = affine(b_x_hat, p_weight, p_bias, o_c, m_c) * (1.0 + b_scale) + b_shift
    # [BLOCK_N, BLOCK_C]
    p_tile = p_y + (i_b * N + o_n)[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=m_rows)


@triton.jit
def _adaln_modulate_bwd_kernel(
    p_dy,
    p_x,
    p_scale,
    p_weight,
    p_bias,
    p_dx,
    p_dshift,
    p_dscale,
    p_sum,
    p_sum_x_hat,
    N,
    C,
    eps,
    n_splits,
    rows_per_split,
    stride_yb,
    stride_yn,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_sn,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of one split of a sample's rows.

    dx is the Jacobian of the norm applied to `dy * (1 + scale) * weight`. Sums over the split, of
    dy and dy * x_hat (per token: times 1 + scale), go to row `program` of [B * n_splits, C]
    buffers. A gradient whose pointer is None is not computed.
    """
    i_b = (tl.program_id(0) // n_splits).to(tl.int64)
    i_split = (tl.program_id(0) % n_splits).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = i_split * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    if p_sum is not None:
        b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        b_sum_x_hat = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        m_rows = m_n[:, None] & m_c[None, :]
        # [BLOCK_N, BLOCK_C]
        o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        b_x = load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
        b_dy = load_rows(p_dy, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
        b_x_hat, b_rstd = normalise(b_x, m_n, m_c, C, eps, RMS)
        store_modulation_gradients(
            b_dy, b_x_hat, p_dshift, p_dscale, p_weight, p_bias, o_out, o_c, m_rows, m_c
        )
        b_g = b_dy
        if PER_TOKEN or p_dx is not None:
            b_g = b_dy * (
                1.0
                + load_modulation(
                    p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
                )
            )
        if p_sum is not None:
            b_summand = b_g if PER_TOKEN else b_dy
            b_sum += b_summand
            b_sum_x_hat += b_summand * b_x_hat
        if p_dx is not None:
            if p_weight is not None:
                b_g = b_g * load_channels(p_weight, o_c, m_c)
            b_dx = project(b_g, b_x_hat, b_rstd, C, RMS)
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m_rows)

    if p_sum is not None:
        # [BLOCK_C]
        o_partial = tl.program_id(0).to(tl.int64) * C + o_c
        tl.store(p_sum + o_partial, tl.sum(b_sum, axis=0), mask=m_c)
        tl.store(p_sum_x_hat + o_partial, tl.sum(b_sum_x_hat, axis=0), mask=m_c)


@triton.jit
def _adaln_modulate_jvp_kernel(
    p_x,
    p_shift,
    p_scale,
    p_weight,
    p_bias,
    p_x_dot,
    p_shift_dot,
    p_scale_dot,
    p_weight_dot,
    p_bias_dot,
    p_y,
    p_y_dot,
    N,
    C,
    eps,
    stride_xb,
    stride_xn,
    stride_hb,
    stride_hn,
    stride_sb,
    stride_sn,
    stride_xdb,
    stride_xdn,
    stride_hdb,
    stride_hdn,
    stride_sdb,
    stride_sdn,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write value and tangent for BLOCK_N rows of one sample; see the reference for the formula.

    A tangent whose pointer is None is zero and costs nothing; without p_y only y_dot is written.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_n = (tl.program_id(0) % n_tiles).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_n = o_n < N
    m_rows = m_n[:, None] & m_c[None, :]
    # [BLOCK_N, BLOCK_C]
    o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]

    b_x = load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
    b_x_hat, b_rstd = normalise(b_x, m_n, m_c, C, eps, RMS)
    b_normal = affine(b_x_hat, p_weight, p_bias, o_c, m_c)
    b_gain = 1.0 + load_modulation(
        p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
    )
    if p_y is not None:
        b_shift = load_modulation(
            p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN
        )
        b_y = b_normal * b_gain + b_shift
        tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_rows)
    b_x_hat_dot = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if p_x_dot is not None:
        b_x_dot = load_rows(p_x_dot, i_b, o_n, o_c, stride_xdb, stride_xdn, m_rows)
        b_x_hat_dot = project(b_x_dot, b_x_hat, b_rstd, C, RMS)
    b_normal_dot = affine_tangent(
        b_x_hat_dot, b_x_hat, p_weight, p_weight_dot, p_bias_dot, o_c, m_c
    )
    b_y_dot = modulate_tangent(
        b_normal_dot, b_normal, b_gain, p_shift_dot, p_scale_dot, i_b, o_n, o_c,
        stride_hdb, stride_hdn, stride_sdb, stride_sdn, m_rows, m_c, PER_TOKEN,
    )  # fmt: skip
    tl.store(p_y_dot + o_out, b_y_dot.to(p_y_dot.dtype.element_ty), mask=m_rows)


def launch_fwd(operands: Operands, options: Options, keep: bool) -> tuple[Tensor]:
    """Return y [B, N, C] in the dtype of x."""
    x, shift, scale, weight, bias = contiguous_operands(operands)
    eps, rms = options
    n_batch, n_tokens, n_channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return (y,)
    block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS["fwd"])
    _adaln_modulate_fwd_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
        x,
        shift,
        scale,
        weight,
        bias,
        y,
        n_tokens,
        n_channels,
        eps,
        *strides_of(x, shift, scale),
        PER_TOKEN=scale.ndim == 3,
        RMS=rms,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return dx, dshift, dscale, dweight and dbias, None for what is not needed.

    Sums are taken in a fixed order.
    """
    (dy,) = contiguous_operands(cotangents)
    x, scale, weight, bias = contiguous_operands(saved)
    eps, rms = options
    n_batch, n_tokens, n_channels = x.shape
    per_token = scale.ndim == 3
    block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS["bwd"])
    summing = any(needs[3:] if per_token else needs[1:])
    rows = rows_per_split(n_batch, n_tokens, block_n) if summing else block_n
    n_splits = triton.cdiv(n_tokens, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    buffers = gradient_buffers(x, scale, n_splits, needs[1:])
    if x.numel() > 0:
        _adaln_modulate_bwd_kernel[(n_batch * n_splits,)](
            dy,
            x,
            scale,
            weight,
            bias,
            dx,
            *buffers,
            n_tokens,
            n_channels,
            eps,
            n_splits,
            rows,
            *strides_of(dy, x, scale),
            PER_TOKEN=per_token,
            RMS=rms,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return dx, *finish_gradients(buffers, scale, weight, bias, needs[1:])


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return (y,), or None without `with_value`, and (y_dot,), [B, N, C] in the dtype of x."""
    primals, tangents = contiguous_operands(primals), contiguous_operands(tangents)
    eps, rms = options
    x, scale = primals[0], primals[2]
    n_batch, n_tokens, n_channels = x.shape
    y_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel() > 0:
        block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS["jvp"])
        _adaln_modulate_jvp_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
            *primals,
            *tangents,
            y,
            y_dot,
            n_tokens,
            n_channels,
            eps,
            *strides_of(*primals[:3], *tangents[:3]),
            PER_TOKEN=scale.ndim == 3,
            RMS=rms,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return None if y is None else (y,), (y_dot,)
