# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the gradient of the gated residual with modulation, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_operands, strides_of
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.modulation import (
    finish_gradients,
    gradient_buffers,
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

# Float32 rows that the kernel keeps in registers at once.
_LIVE_ROWS = 7

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]

_NOTHING = (None,) * 4


@triton.jit
def _gated_residual_adaln_bwd_kernel(
    p_dx_new,
    p_dh,
    p_x_new,
    p_y,
    p_gate,
    p_scale,
    p_weight,
    p_bias,
    p_dx,
    p_dy,
    p_dgate,
    p_sum_gate,
    p_dshift,
    p_dscale,
    p_sum,
    p_sum_x_hat,
    N,
    C,
    eps,
    n_splits,
    rows_per_split,
    stride_db,
    stride_dn,
    stride_hb,
    stride_hn,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_sb,
    stride_sn,
    GATE_PER_TOKEN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of one split of a sample's rows.

    `dx = dx_new + J(dh * (1 + scale) * weight)` with the Jacobian J of the norm, `dy = gate * dx`,
    `dgate = y * dx`. What is summed over the split, y * dx of a gate per sample and the sums of
    `gradient_buffers`, goes to row `program` of [B * n_splits, C] buffers. A cotangent whose
    pointer is None is zero; a gradient whose pointer is None is not computed.
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
    if p_sum_gate is not None:
        b_sum_gate = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        m_rows = m_n[:, None] & m_c[None, :]
        # [BLOCK_N, BLOCK_C]
        o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        if p_dh is not None:
            b_x_new = load_rows(p_x_new, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
            b_dh = load_rows(p_dh, i_b, o_n, o_c, stride_hb, stride_hn, m_rows)
            b_x_hat, b_rstd = normalise(b_x_new, m_n, m_c, C, eps, RMS)
            store_modulation_gradients(
                b_dh, b_x_hat, p_dshift, p_dscale, p_weight, p_bias, o_out, o_c, m_rows, m_c
            )
            # Loaded for each tile, from the first-level cache: as a row kept it would spill.
            b_g = b_dh * (
                1.0
                + load_modulation(
                    p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
                )
            )
            if p_sum is not None:
                b_summand = b_g if PER_TOKEN else b_dh
                b_sum += b_summand
                b_sum_x_hat += b_summand * b_x_hat
            if p_weight is not None:
                b_g = b_g * load_channels(p_weight, o_c, m_c)
            b_dx = project(b_g, b_x_hat, b_rstd, C, RMS)
            if p_dx_new is not None:
                b_dx += load_rows(p_dx_new, i_b, o_n, o_c, stride_db, stride_dn, m_rows)
        else:
            b_dx = load_rows(p_dx_new, i_b, o_n, o_c, stride_db, stride_dn, m_rows)
        if p_dx is not None:
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m_rows)
        if p_dy is not None:
            b_dy = b_dx * load_modulation(
                p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, GATE_PER_TOKEN
            )
            tl.store(p_dy + o_out, b_dy.to(p_dy.dtype.element_ty), mask=m_rows)
        if p_dgate is not None or p_sum_gate is not None:
            # The projection of what lies outside the mask is not zero, but y is.
            b_dgate = b_dx * load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
            if p_dgate is not None:
                tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=m_rows)
            if p_sum_gate is not None:
                b_sum_gate += b_dgate

    # [BLOCK_C]
    o_partial = tl.program_id(0).to(tl.int64) * C + o_c
    if p_sum is not None:
        tl.store(p_sum + o_partial, tl.sum(b_sum, axis=0), mask=m_c)
        tl.store(p_sum_x_hat + o_partial, tl.sum(b_sum_x_hat, axis=0), mask=m_c)
    if p_sum_gate is not None:
        tl.store(p_sum_gate + o_partial, tl.sum(b_sum_gate, axis=0), mask=m_c)


def plan(dtype: torch.dtype, n_channels: int) -> tuple[int, int, int, bool]:
    """Choose BLOCK_N, BLOCK_C, warps, and whether the modulation's gradients are launched apart.

    The widest float32 rows and all the sums do not fit the registers at once.
    """
    block_n, block_c, num_warps = tile(n_channels, _LIVE_ROWS)
    if dtype == torch.float32 and block_c > 4096:
        return block_n, block_c, 32, True
    return block_n, block_c, num_warps, False


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: Options
) -> Operands:
    """Return a gradient for each operand, None for what is not needed.

    Sums are taken in a fixed order.
    """
    dx_new, dh = contiguous_operands(cotangents)
    x_new, y, gate, scale, weight, bias = contiguous_operands(saved)
    n_batch, n_tokens, n_channels = x_new.shape
    gate_per_token, per_token = gate.ndim == 3, scale.ndim == 3
    needs_x, needs_y, needs_gate, *needs_modulation = needs
    block_n, block_c, num_warps, apart = plan(x_new.dtype, n_channels)
    summing = any(needs_modulation[2:] if per_token else needs_modulation)
    summing = summing or (needs_gate and not gate_per_token)
    rows = rows_per_split(n_batch, n_tokens, block_n) if summing else block_n
    n_splits = triton.cdiv(n_tokens, rows)

    def empty(like: Tensor, need: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else None

    dx, dy = empty(x_new, needs_x), empty(y, needs_y)
    dgate = empty(gate, needs_gate and gate_per_token)
    sum_gate = None
    if needs_gate and not gate_per_token:
        shape = (n_batch, n_splits, n_channels)
        sum_gate = torch.empty(shape, dtype=torch.float32, device=gate.device)
    buffers = gradient_buffers(x_new, scale, n_splits, tuple(needs_modulation))
    if dh is None:
        # The modulation had no part in the loss.
        buffers = tuple(None if t is None else t.zero_() for t in buffers)
    of_residual = (dx, dy, dgate, sum_gate)
    launches = [(*of_residual, *buffers)]
    if dh is None:
        launches = [(*of_residual, *_NOTHING)]
    elif apart:
        launches = [(*of_residual, *_NOTHING), (*_NOTHING, *buffers)]
    for outputs in launches:
        if x_new.numel() == 0 or all(t is None for t in outputs):
            continue
        _gated_residual_adaln_bwd_kernel[(n_batch * n_splits,)](
            *(dx_new, dh, x_new, y, gate, scale, weight, bias),
            *outputs,
            *(n_tokens, n_channels, options[0], n_splits, rows),
            *strides_of(dx_new, dh, x_new, y, gate, scale),
            GATE_PER_TOKEN=gate_per_token,
            PER_TOKEN=per_token,
            RMS=options[1],
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    if sum_gate is not None:
        dgate = sum_gate.sum(1).to(gate.dtype)
    return dx, dy, dgate, *finish_gradients(buffers, scale, weight, bias, tuple(needs_modulation))
