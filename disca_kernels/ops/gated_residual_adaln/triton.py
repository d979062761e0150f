# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the gated residual with modulation, and their launchers.

A program owns whole rows: it keeps them in registers from the residual to the modulated norm, so
that x_new is written once and not read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_operands, strides_of
from disca_kernels.ops.gated_residual_adaln.triton_backward import launch_bwd
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.modulation import affine, affine_tangent, modulate_tangent
from disca_kernels.triton_common.rows import load_modulation, load_rows, normalise, project, tile

__all__ = ["LIVE_ROWS", "launch_bwd", "launch_fwd", "launch_jvp"]

prepare_interpreter()

LIVE_ROWS = {"fwd": 4, "jvp": 6}
"""Float32 rows that a kernel keeps in registers at once."""

Operands = tuple[Tensor | None, ...]
Options = tuple[float, bool]
Pair = tuple[Tensor, Tensor]


@triton.jit
def _gated_residual_adaln_fwd_kernel(
    p_x,
    p_y,
    p_gate,
    p_shift,
    p_scale,
    p_weight,
    p_bias,
    p_x_new,
    p_h,
    N,
    C,
    eps,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_hb,
    stride_hn,
    stride_sb,
    stride_sn,
    GATE_PER_TOKEN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write x_new and h for BLOCK_N rows of one sample."""
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
    b_y = load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
    b_gate = load_modulation(
        p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, GATE_PER_TOKEN
    )
    b_x_new = (b_x + b_gate * b_y).to(p_x_new.dtype.element_ty)
    tl.store(p_x_new + o_out, b_x_new, mask=m_rows)
    b_x_hat, _ = normalise(b_x_new.to(tl.float32), m_n, m_c, C, eps, RMS)
    b_scale = load_modulation(p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN)
    b_shift = load_modulation(p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN)
    b_h = affine(b_x_hat, p_weight, p_bias, o_c, m_c) * (1.0 + b_scale) + b_shift
    tl.store(p_h + o_out, b_h.to(p_h.dtype.element_ty), mask=m_rows)


@triton.jit
def _gated_residual_adaln_jvp_kernel(
    p_x,
    p_y,
    p_gate,
    p_shift,
    p_scale,
    p_weight,
    p_bias,
    p_x_dot,
    p_y_dot,
    p_gate_dot,
    p_shift_dot,
    p_scale_dot,
    p_weight_dot,
    p_bias_dot,
    p_x_new,
    p_h,
    p_x_new_dot,
    p_h_dot,
    N,
    C,
    eps,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_hb,
    stride_hn,
    stride_sb,
    stride_sn,
    stride_xdb,
    stride_xdn,
    stride_ydb,
    stride_ydn,
    stride_gdb,
    stride_gdn,
    stride_hdb,
    stride_hdn,
    stride_sdb,
    stride_sdn,
    GATE_PER_TOKEN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write values and tangents for BLOCK_N rows of one sample; see the reference for the formula.

    A tangent whose pointer is None is zero and costs nothing; without p_x_new only the tangents are
    written.
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
    b_y = load_rows(p_y, i_b, o_n, o_c, stride_yb, stride_yn, m_rows)
    b_gate = load_modulation(
        p_gate, i_b, o_n, o_c, stride_gb, stride_gn, m_rows, m_c, GATE_PER_TOKEN
    )
    b_x_new_dot = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if p_x_dot is not None:
        b_x_new_dot += load_rows(p_x_dot, i_b, o_n, o_c, stride_xdb, stride_xdn, m_rows)
    if p_y_dot is not None:
        b_y_dot = load_rows(p_y_dot, i_b, o_n, o_c, stride_ydb, stride_ydn, m_rows)
        b_x_new_dot += b_gate * b_y_dot
    if p_gate_dot is not None:
        b_x_new_dot += b_y * load_modulation(
            p_gate_dot, i_b, o_n, o_c, stride_gdb, stride_gdn, m_rows, m_c, GATE_PER_TOKEN
        )
    tl.store(p_x_new_dot + o_out, b_x_new_dot.to(p_x_new_dot.dtype.element_ty), mask=m_rows)
    # The dtype of x_new is that of its tangent.
    b_x_new = (b_x + b_gate * b_y).to(p_x_new_dot.dtype.element_ty)
    if p_x_new is not None:
        tl.store(p_x_new + o_out, b_x_new, mask=m_rows)

    b_x_hat, b_rstd = normalise(b_x_new.to(tl.float32), m_n, m_c, C, eps, RMS)
    b_x_hat_dot = project(b_x_new_dot, b_x_hat, b_rstd, C, RMS)
    b_normal = affine(b_x_hat, p_weight, p_bias, o_c, m_c)
    b_gain = 1.0 + load_modulation(
        p_scale, i_b, o_n, o_c, stride_sb, stride_sn, m_rows, m_c, PER_TOKEN
    )
    if p_h is not None:
        b_shift = load_modulation(
            p_shift, i_b, o_n, o_c, stride_hb, stride_hn, m_rows, m_c, PER_TOKEN
        )
        tl.store(p_h + o_out, (b_normal * b_gain + b_shift).to(p_h.dtype.element_ty), mask=m_rows)
    b_normal_dot = affine_tangent(
        b_x_hat_dot, b_x_hat, p_weight, p_weight_dot, p_bias_dot, o_c, m_c
    )
    b_h_dot = modulate_tangent(
        b_normal_dot, b_normal, b_gain, p_shift_dot, p_scale_dot, i_b, o_n, o_c,
        stride_hdb, stride_hdn, stride_sdb, stride_sdn, m_rows, m_c, PER_TOKEN,
    )  # fmt: skip
    tl.store(p_h_dot + o_out, b_h_dot.to(p_h_dot.dtype.element_ty), mask=m_rows)


def launch_fwd(operands: Operands, options: Options, keep: bool) -> Pair:
    """Return x_new and h, [B, N, C] in the dtype of x."""
    operands = contiguous_operands(operands)
    x, _, gate, _, scale, _, _ = operands
    eps, rms = options
    n_batch, n_tokens, n_channels = x.shape
    x_new, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel() > 0:
        block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS["fwd"])
        _gated_residual_adaln_fwd_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
            *operands,
            x_new,
            h,
            n_tokens,
            n_channels,
            eps,
            *strides_of(*operands[:5]),
            GATE_PER_TOKEN=gate.ndim == 3,
            PER_TOKEN=scale.ndim == 3,
            RMS=rms,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return x_new, h


def launch_jvp(
    primals: Operands, tangents: Operands, options: Options, with_value: bool, keep: bool
) -> tuple[Pair | None, Pair]:
    """Return (x_new, h), or None without `with_value`, and their tangents, [B, N, C] like x."""
    primals, tangents = contiguous_operands(primals), contiguous_operands(tangents)
    x, _, gate, _, scale, _, _ = primals
    eps, rms = options
    n_batch, n_tokens, n_channels = x.shape
    outputs: list[Tensor | None] = [None, None]
    if with_value:
        outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2)]
    x_new_dot, h_dot = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel() > 0:
        block_n, block_c, num_warps = tile(n_channels, LIVE_ROWS["jvp"])
        _gated_residual_adaln_jvp_kernel[(n_batch * triton.cdiv(n_tokens, block_n),)](
            *primals,
            *tangents,
            *outputs,
            x_new_dot,
            h_dot,
            n_tokens,
            n_channels,
            eps,
            *strides_of(*primals[:5], *tangents[:5]),
            GATE_PER_TOKEN=gate.ndim == 3,
            PER_TOKEN=scale.ndim == 3,
            RMS=rms,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return (outputs[0], outputs[1]) if with_value else None, (x_new_dot, h_dot)
