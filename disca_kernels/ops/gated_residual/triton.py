# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the gated residual, and their launchers.

Every element stands alone, so a program takes a tile of some rows and some of their channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_operands, strides_of
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.rows import load_modulation, load_rows, rows_per_split

prepare_interpreter()

_TILE_ELEMENTS = 2048
_MAX_BLOCK_C = 1024
_MAX_BLOCK_N = 32

Operands = tuple[Tensor | None, ...]


@triton.jit
def _tile_of(N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sample, the rows and the channels of this program; neighbours share rows."""
    n_across, n_down = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) // n_across
    i_b = (i_tile // n_down).to(tl.int64)
    o_n = (i_tile % n_down).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(0) % n_across * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_b, o_n, o_c


@triton.jit
def _gated_residual_fwd_kernel(
    p_x,
    p_y,
    p_gate,
    p_out,
    N,
    C,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write `x + gate * y` for a tile."""
    i_b, o_n, o_c = _tile_of(N, C, BLOCK_N, BLOCK_C)
    m_c = o_c < C
    m_rows = (o_n < N)[:, None] & m_c[None, :]
    b_x = load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
    b_y = load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
    b_gate = load_modulation(p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, PER_TOKEN)
    # [BLOCK_N, BLOCK_C]
    p_tile = p_out + (i_b * N + o_n)[:, None] * C + o_c[None, :]
    tl.store(p_tile, (b_x + b_gate * b_y).to(p_out.dtype.element_ty), mask=m_rows)


@triton.jit
def _gated_residual_bwd_kernel(
    p_dout,
    p_y,
    p_gate,
    p_dy,
    p_dgate,
    p_sum,
    N,
    C,
    n_splits,
    rows_per_split,
    stride_ob,
    stride_on,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of one split of a sample's rows, for BLOCK_C channels.

    `dy = dout * gate` and `dgate = dout * y`, per token as it is, per sample as the sum over the
    split, in row (sample, split) of a [B * n_splits, C] buffer. A gradient whose pointer is None
    is not computed.
    """
    n_across = tl.cdiv(C, BLOCK_C)
    i_part = (tl.program_id(0) // n_across).to(tl.int64)
    i_b, i_split = i_part // n_splits, i_part % n_splits
    o_c = tl.program_id(0) % n_across * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = i_split * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    if p_sum is not None:
        b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_rows = (o_n < last)[:, None] & m_c[None, :]
        # [BLOCK_N, BLOCK_C]
        o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        b_dout = load_rows(p_dout, i_b, o_n, o_c, stride_ob, stride_on, m_rows)
        if p_dy is not None:
            b_dy = b_dout * load_modulation(
                p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, PER_TOKEN
            )
            tl.store(p_dy + o_out, b_dy.to(p_dy.dtype.element_ty), mask=m_rows)
        if p_dgate is not None or p_sum is not None:
            b_dgate = b_dout * load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
            if p_dgate is not None:
                tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=m_rows)
            if p_sum is not None:
                b_sum += b_dgate

    if p_sum is not None:
        # [BLOCK_C]
        tl.store(p_sum + i_part * C + o_c, tl.sum(b_sum, axis=0), mask=m_c)


@triton.jit
def _gated_residual_jvp_kernel(
    p_x,
    p_y,
    p_gate,
    p_x_dot,
    p_y_dot,
    p_gate_dot,
    p_out,
    p_out_dot,
    N,
    C,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_xdb,
    stride_xdn,
    stride_ydb,
    stride_ydn,
    stride_gdb,
    stride_gdn,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write value and tangent `x_dot + gate * y_dot + gate_dot * y` for a tile.

    A tangent whose pointer is None is zero and costs nothing; without p_out only the tangent is
    written.
    """
    i_b, o_n, o_c = _tile_of(N, C, BLOCK_N, BLOCK_C)
    m_c = o_c < C
    m_rows = (o_n < N)[:, None] & m_c[None, :]
    # [BLOCK_N, BLOCK_C]
    o_out = (i_b * N + o_n)[:, None] * C + o_c[None, :]
    b_dot = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if p_x_dot is not None:
        b_dot += load_rows(p_x_dot, i_b, o_n, o_c, stride_xdb, stride_xdn, m_rows)
    if p_out is not None or p_y_dot is not None:
        b_gate = load_modulation(
            p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, PER_TOKEN
        )
    if p_out is not None or p_gate_dot is not None:
        b_y = load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
    if p_out is not None:
        b_x = load_rows(p_x, i_b, o_n, o_c, stride_xb, stride_xn, m_rows)
        tl.store(p_out + o_out, (b_x + b_gate * b_y).to(p_out.dtype.element_ty), mask=m_rows)
    if p_y_dot is not None:
        b_dot += b_gate * load_rows(p_y_dot, i_b, o_n, o_c, stride_ydb, stride_ydn, m_rows)
    if p_gate_dot is not None:
        b_dot += b_y * load_modulation(
            p_gate_dot, i_b, o_n, o_c, stride_gdb, stride_gdn, m_rows, m_c, PER_TOKEN
        )
    tl.store(p_out_dot + o_out, b_dot.to(p_out_dot.dtype.element_ty), mask=m_rows)


def tile(n_channels: int) -> tuple[int, int, int]:
    """Choose BLOCK_N, BLOCK_C and warps: 16 elements a thread, few of them beyond the row."""
    block_c = min(max(16, triton.next_power_of_2(n_channels)), _MAX_BLOCK_C)
    while n_channels % block_c and block_c > 256:
        block_c //= 2
    block_n = min(_TILE_ELEMENTS // block_c, _MAX_BLOCK_N)
    return block_n, block_c, max(block_n * block_c // 512, 1)


def launch_fwd(operands: Operands, options: tuple[()], keep: bool) -> tuple[Tensor]:
    """Return x + gate * y, [B, N, C] in the dtype of x."""
    x, y, gate = contiguous_operands(operands)
    n_batch, n_tokens, n_channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        block_n, block_c, num_warps = tile(n_channels)
        n_tiles = triton.cdiv(n_tokens, block_n) * triton.cdiv(n_channels, block_c)
        _gated_residual_fwd_kernel[(n_batch * n_tiles,)](
            x,
            y,
            gate,
            out,
            n_tokens,
            n_channels,
            *strides_of(x, y, gate),
            PER_TOKEN=gate.ndim == 3,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return (out,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[()]
) -> Operands:
    """Return dy and dgate after None, which stands for dx: it is the cotangent itself.

    A gradient that is not needed is None too; sums are taken in a fixed order.
    """
    (dout,) = contiguous_operands(cotangents)
    y, gate = contiguous_operands(saved)
    n_batch, n_tokens, n_channels = dout.shape
    per_token = gate.ndim == 3
    block_n, block_c, num_warps = tile(n_channels)
    n_across = triton.cdiv(n_channels, block_c)
    summing = needs[2] and not per_token
    rows = rows_per_split(n_batch, n_tokens, block_n) if summing else block_n
    n_splits = triton.cdiv(n_tokens, rows)
    _, needs_y, needs_gate = needs
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device) if needs_y else None
    dgate = sums = None
    if summing:
        shape = (n_batch, n_splits, n_channels)
        sums = torch.empty(shape, dtype=torch.float32, device=y.device)
    elif needs_gate:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if dout.numel() > 0:
        _gated_residual_bwd_kernel[(n_batch * n_splits * n_across,)](
            dout,
            y,
            gate,
            dy,
            dgate,
            sums,
            n_tokens,
            n_channels,
            n_splits,
            rows,
            *strides_of(dout, y, gate),
            PER_TOKEN=per_token,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return None, dy, dgate if sums is None else sums.sum(1).to(gate.dtype)


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[()], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return the value, or None without `with_value`, and the tangent, [B, N, C] like x."""
    primals, tangents = contiguous_operands(primals), contiguous_operands(tangents)
    x, _, gate = primals
    n_batch, n_tokens, n_channels = x.shape
    out_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(out_dot) if with_value else None
    if out_dot.numel() > 0:
        block_n, block_c, num_warps = tile(n_channels)
        n_tiles = triton.cdiv(n_tokens, block_n) * triton.cdiv(n_channels, block_c)
        _gated_residual_jvp_kernel[(n_batch * n_tiles,)](
            *primals,
            *tangents,
            out,
            out_dot,
            n_tokens,
            n_channels,
            *strides_of(*primals, *tangents),
            PER_TOKEN=gate.ndim == 3,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return None if out is None else (out,), (out_dot,)
