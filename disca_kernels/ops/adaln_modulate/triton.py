# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of adaptive layer-norm modulation, and their launchers.

A program owns whole rows: it keeps them in registers, so that a row is read once however often
its mean, variance and normalised values are needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_rows, row_strides
from disca_kernels.testing.interpreter import prepare_interpreter

prepare_interpreter()

_TILE_ELEMENTS = 2048
_MAX_ROWS_PER_TILE = 16
# Programs of the backward pass: about four for each multiprocessor of the largest devices. It is a
# constant, not the size of this device, so that the order of summation is the same everywhere.
_BACKWARD_PROGRAMS = 512


@triton.jit
def _load_rows(p_rows, i_b, o_n, o_c, stride_b, stride_n, m_rows):
    """Load a tile of rows as float32."""
    # [BLOCK_N, BLOCK_C]
    p_tile = p_rows + i_b * stride_b + o_n[:, None] * stride_n + o_c[None, :]
    return tl.load(p_tile, mask=m_rows, other=0.0).to(tl.float32)


@triton.jit
def _load_modulation(
    p_modulation, i_b, o_n, o_c, stride_b, stride_n, m_rows, m_c, PER_TOKEN: tl.constexpr
):
    """Load what modulates a tile as float32: one row of the sample, or a row for each token."""
    if PER_TOKEN:
        # [BLOCK_N, BLOCK_C]
        b_modulation = _load_rows(p_modulation, i_b, o_n, o_c, stride_b, stride_n, m_rows)
    else:
        # [1, BLOCK_C]
        p_row = p_modulation + i_b * stride_b + o_c[None, :]
        b_modulation = tl.load(p_row, mask=m_c[None, :], other=0.0).to(tl.float32)
    return b_modulation


@triton.jit
def _normalise(b_x, m_c, C, eps):
    """Return the normalised rows, zero outside the mask, and their 1 / standard deviation."""
    b_mean = tl.sum(b_x, axis=1, keep_dims=True) / C
    b_centred = tl.where(m_c[None, :], b_x - b_mean, 0.0)
    b_variance = tl.sum(b_centred * b_centred, axis=1, keep_dims=True) / C
    b_rstd = 1.0 / tl.sqrt_rn(b_variance + eps)
    return b_centred * b_rstd, b_rstd


@triton.jit
def _adaln_modulate_fwd_kernel(
    p_x,
    p_shift,
    p_scale,
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
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write `y = x_hat * (1 + scale) + shift` for BLOCK_N rows of one sample."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_n = (tl.program_id(0) % n_tiles).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_rows = (o_n < N)[:, None] & m_c[None, :]

    b_x = _load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
    b_scale = _load_modulation(p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN)
    b_shift = _load_modulation(p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN)
    b_x_hat, _ = _normalise(b_x, m_c, C, eps)
    b_y = b_x_hat * (1.0 + b_scale) + b_shift
    # [BLOCK_N, BLOCK_C]
    p_tile = p_y + (i_b * N + o_n)[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=m_rows)


@triton.jit
def _adaln_modulate_bwd_kernel(
    p_dy,
    p_x,
    p_scale,
    p_dx,
    p_dshift,
    p_dscale,
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
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of one split of a sample's rows.

    With g = dy * (1 + scale): `dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))`. The gradients
    of a modulation are dy and dy * x_hat: per token they are stored as they are, per sample their
    sum over the split goes to row `program` of a [B * n_splits, C] buffer. A gradient whose pointer
    is None is not computed.
    """
    i_b = (tl.program_id(0) // n_splits).to(tl.int64)
    i_split = (tl.program_id(0) % n_splits).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = i_split * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    if not PER_TOKEN:
        # [1, BLOCK_C]
        b_scale = _load_modulation(
            p_scale, i_b, o_c, o_c, stride_sb, stride_sn, m_c, m_c, PER_TOKEN
        )
    if p_dshift is not None and not PER_TOKEN:
        b_dshift = tl.zeros([BLOCK_C], tl.float32)
        b_dscale = tl.zeros([BLOCK_C], tl.float32)

    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_rows = (o_n < last)[:, None] & m_c[None, :]
        # [BLOCK_N, BLOCK_C]
        o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        b_x = _load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
        b_dy = _load_rows(p_dy, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
        b_x_hat, b_rstd = _normalise(b_x, m_c, C, eps)
        if p_dshift is not None:
            b_dy_x_hat = b_dy * b_x_hat
            if PER_TOKEN:
                tl.store(p_dshift + o_out, b_dy.to(p_dshift.dtype.element_ty), mask=m_rows)
                tl.store(p_dscale + o_out, b_dy_x_hat.to(p_dscale.dtype.element_ty), mask=m_rows)
            else:
                b_dshift += tl.sum(b_dy, axis=0)
                b_dscale += tl.sum(b_dy_x_hat, axis=0)
        if p_dx is not None:
            if PER_TOKEN:
                b_scale = _load_modulation(
                    p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
                )
            b_g = b_dy * (1.0 + b_scale)
            b_mean = tl.sum(b_g, axis=1, keep_dims=True) / C
            b_correlation = tl.sum(b_g * b_x_hat, axis=1, keep_dims=True) / C
            b_dx = b_rstd * (b_g - b_mean - b_x_hat * b_correlation)
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m_rows)

    if p_dshift is not None and not PER_TOKEN:
        # [BLOCK_C]
        o_partial = tl.program_id(0).to(tl.int64) * C + o_c
        tl.store(p_dshift + o_partial, b_dshift, mask=m_c)
        tl.store(p_dscale + o_partial, b_dscale, mask=m_c)


@triton.jit
def _adaln_modulate_jvp_kernel(
    p_x,
    p_shift,
    p_scale,
    p_x_dot,
    p_shift_dot,
    p_scale_dot,
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
    m_rows = (o_n < N)[:, None] & m_c[None, :]
    # [BLOCK_N, BLOCK_C]
    o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]

    b_x = _load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
    b_x_hat, b_rstd = _normalise(b_x, m_c, C, eps)
    b_y_dot = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if p_x_dot is not None or p_y is not None:
        b_gain = 1.0 + _load_modulation(
            p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
        )
    if p_y is not None:
        b_shift = _load_modulation(
            p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN
        )
        b_y = b_x_hat * b_gain + b_shift
        tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_rows)
    if p_x_dot is not None:
        b_x_dot = _load_rows(p_x_dot, i_b, o_n, o_c, stride_xdb, stride_xdn, m_rows)
        b_mean = tl.sum(b_x_dot, axis=1, keep_dims=True) / C
        b_correlation = tl.sum(b_x_hat * b_x_dot, axis=1, keep_dims=True) / C
        b_y_dot += b_rstd * (b_x_dot - b_mean - b_x_hat * b_correlation) * b_gain
    if p_scale_dot is not None:
        b_y_dot += b_x_hat * _load_modulation(
            p_scale_dot, i_b, o_n, o_c, stride_sdb, stride_sdn, m_rows, m_c, PER_TOKEN
        )
    if p_shift_dot is not None:
        b_y_dot += _load_modulation(
            p_shift_dot, i_b, o_n, o_c, stride_hdb, stride_hdn, m_rows, m_c, PER_TOKEN
        )
    tl.store(p_y_dot + o_out, b_y_dot.to(p_y_dot.dtype.element_ty), mask=m_rows)


def tile(n_channels: int, live_rows: int) -> tuple[int, int, int]:
    """Choose BLOCK_N, BLOCK_C and warps so that `live_rows` float32 tiles stay in registers."""
    block_c = max(16, triton.next_power_of_2(n_channels))
    block_n = min(max(1, _TILE_ELEMENTS // block_c), _MAX_ROWS_PER_TILE)
    per_warp = 1024 if live_rows <= 4 else 512
    return block_n, block_c, min(max(block_n * block_c // per_warp, 1), 16)


def launch_fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y [B, N, C] in the dtype of x."""
    n_batch, n_tokens, n_channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, shift, scale = contiguous_rows(x), contiguous_rows(shift), contiguous_rows(scale)
    block_n, block_c, num_warps = tile(n_channels, live_rows=3)
    _adaln_modulate_fwd_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
        x,
        shift,
        scale,
        y,
        n_tokens,
        n_channels,
        eps,
        *row_strides(x),
        *row_strides(shift),
        *row_strides(scale),
        PER_TOKEN=scale.ndim == 3,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return y


def launch_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float, needs_x: bool, needs_modulation: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dshift and dscale, None for what is not needed; sums in a fixed order."""
    n_batch, n_tokens, n_channels = x.shape
    per_token = scale.ndim == 3
    block_n, block_c, num_warps = tile(n_channels, live_rows=6)
    rows = block_n
    if not per_token:
        wanted = triton.cdiv(_BACKWARD_PROGRAMS, max(n_batch, 1))
        rows *= max(1, triton.cdiv(triton.cdiv(n_tokens, block_n), wanted))
    n_splits = triton.cdiv(n_tokens, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    sums: list[Tensor | None] = [None, None]
    if needs_modulation:
        shape = x.shape if per_token else (n_batch, n_splits, n_channels)
        dtype = scale.dtype if per_token else torch.float32
        sums = [torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2)]
    if x.numel() > 0:
        dy, x, scale = contiguous_rows(dy), contiguous_rows(x), contiguous_rows(scale)
        _adaln_modulate_bwd_kernel[(n_batch * n_splits,)](
            dy,
            x,
            scale,
            dx,
            *sums,
            n_tokens,
            n_channels,
            eps,
            n_splits,
            rows,
            *row_strides(dy),
            *row_strides(x),
            *row_strides(scale),
            PER_TOKEN=per_token,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    if needs_modulation and not per_token:
        sums = [partial.sum(1).to(scale.dtype) for partial in sums]
    return dx, *sums


def launch_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    with_value: bool,
) -> tuple[Tensor | None, Tensor]:
    """Return y (None without `with_value`) and y_dot, both [B, N, C] in the dtype of x."""
    x, shift, scale = (contiguous_rows(t) for t in primals)
    tangents = tuple(None if t is None else contiguous_rows(t) for t in tangents)
    n_batch, n_tokens, n_channels = x.shape
    y_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel() == 0:
        return y, y_dot
    block_n, block_c, num_warps = tile(n_channels, live_rows=5)
    operands = (x, shift, scale, *tangents)
    strides = [s for t in operands for s in ((0, 0) if t is None else row_strides(t))]
    _adaln_modulate_jvp_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
        x,
        shift,
        scale,
        *tangents,
        y,
        y_dot,
        n_tokens,
        n_channels,
        eps,
        *strides,
        PER_TOKEN=scale.ndim == 3,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return y, y_dot
