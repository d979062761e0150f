# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of one step along a mean velocity, and their launchers.

A sample is one row of L numbers, whatever its dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.operands import contiguous_rows
from disca_kernels.testing.interpreter import prepare_interpreter
from disca_kernels.triton_common.rows import rows_per_split

prepare_interpreter()

BLOCK = 2048
NUM_WARPS = {"fwd": 4, "bwd": 8, "jvp": 4}
"""The sum in float64 would spill with four warps, on 10.0 with times in float64."""

Operands = tuple[Tensor | None, ...]


@triton.jit
def _step(p_t, p_r, i_b, stride_t, stride_r):
    """Return `t - r` of a sample as float32; a pointer that is None stands for zero."""
    step = 0.0
    if p_t is not None:
        step = tl.load(p_t + i_b * stride_t)
    if p_r is not None:
        step = step - tl.load(p_r + i_b * stride_r)
    return step.to(tl.float32)


@triton.jit
def _load(p_row, o_l, m_l):
    """Load a part of a row as float32."""
    # [BLOCK]
    return tl.load(p_row + o_l, mask=m_l, other=0.0).to(tl.float32)


@triton.jit
def _mean_velocity_step_fwd_kernel(
    p_x, p_u, p_t, p_r, p_y, L, stride_x, stride_u, stride_t, stride_r, BLOCK: tl.constexpr
):
    """Write `x - (t - r) * u` for a part of one sample."""
    n_parts = tl.cdiv(L, BLOCK)
    i_b = (tl.program_id(0) // n_parts).to(tl.int64)
    o_l = (tl.program_id(0) % n_parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_l = o_l < L
    step = _step(p_t, p_r, i_b, stride_t, stride_r)
    b_x = _load(p_x + i_b * stride_x, o_l, m_l)
    b_u = _load(p_u + i_b * stride_u, o_l, m_l)
    b_y = b_x - step * b_u
    tl.store(p_y + i_b * L + o_l, b_y.to(p_y.dtype.element_ty), mask=m_l)


@triton.jit
def _mean_velocity_step_jvp_kernel(
    p_x, p_u, p_t, p_r, p_x_dot, p_u_dot, p_t_dot, p_r_dot, p_y, p_y_dot, L,
    stride_x, stride_u, stride_t, stride_r, stride_xd, stride_ud, stride_td, stride_rd,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write value and tangent of a part of one sample; see the reference for the formula.

    A tangent whose pointer is None is zero; without p_y only y_dot is written.
    """
    n_parts = tl.cdiv(L, BLOCK)
    i_b = (tl.program_id(0) // n_parts).to(tl.int64)
    o_l = (tl.program_id(0) % n_parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_l = o_l < L
    step = _step(p_t, p_r, i_b, stride_t, stride_r)
    b_dot = tl.zeros([BLOCK], tl.float32)
    if p_x_dot is not None:
        b_dot += _load(p_x_dot + i_b * stride_xd, o_l, m_l)
    if p_u_dot is not None:
        b_dot -= step * _load(p_u_dot + i_b * stride_ud, o_l, m_l)
    if p_y is not None or p_t_dot is not None or p_r_dot is not None:
        b_u = _load(p_u + i_b * stride_u, o_l, m_l)
    if p_t_dot is not None or p_r_dot is not None:
        b_dot -= _step(p_t_dot, p_r_dot, i_b, stride_td, stride_rd) * b_u
    if p_y is not None:
        b_y = _load(p_x + i_b * stride_x, o_l, m_l) - step * b_u
        tl.store(p_y + i_b * L + o_l, b_y.to(p_y.dtype.element_ty), mask=m_l)
    tl.store(p_y_dot + i_b * L + o_l, b_dot.to(p_y_dot.dtype.element_ty), mask=m_l)


@triton.jit
def _mean_velocity_step_bwd_kernel(
    p_dy, p_u, p_t, p_r, p_du, p_sum, L, n_splits, per_split, stride_y, stride_u, stride_t,
    stride_r, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `du = -(t - r) * dy` of one split of a sample, and its sum of `dy * u`.

    The sum goes to element `i_b * n_splits + i_split`; the lanes are added in float64, because
    thousands of terms of either sign leave few digits. A gradient whose pointer is None is not
    computed.
    """
    i_b = (tl.program_id(0) // n_splits).to(tl.int64)
    first = (tl.program_id(0) % n_splits).to(tl.int64) * per_split
    last = tl.minimum(first + per_split, L)
    step = _step(p_t, p_r, i_b, stride_t, stride_r)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_l in range(first, last, BLOCK):
        o_l = i_l + tl.arange(0, BLOCK)
        m_l = o_l < last
        b_dy = _load(p_dy + i_b * stride_y, o_l, m_l)
        if p_du is not None:
            b_du = -step * b_dy
            tl.store(p_du + i_b * L + o_l, b_du.to(p_du.dtype.element_ty), mask=m_l)
        if p_sum is not None:
            b_sum += b_dy * _load(p_u + i_b * stride_u, o_l, m_l)
    if p_sum is not None:
        tl.store(p_sum + tl.program_id(0), tl.sum(b_sum.to(tl.float64), axis=0))


def _flat(tensor: Tensor | None) -> Tensor | None:
    """Return [B, ...] as [B, L]: a view, unless the elements of a sample are apart."""
    if tensor is None:
        return None
    length = tensor.shape[1:].numel()
    return contiguous_rows(tensor.reshape(tensor.shape[0], length))


def _strides(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in tensors]


def launch_fwd(operands: Operands, options: tuple[()], keep: bool) -> tuple[Tensor]:
    """Return x_r in the shape and dtype of x."""
    x, u, t, r = operands
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        x, u = _flat(x), _flat(u)
        n_batch, length = x.shape
        _mean_velocity_step_fwd_kernel[(n_batch * triton.cdiv(length, BLOCK),)](
            x, u, t, r, y, length, *_strides(x, u, t, r), BLOCK=BLOCK, num_warps=NUM_WARPS["fwd"]
        )
    return (y,)


def launch_bwd(
    cotangents: Operands, saved: Operands, needs: tuple[bool, ...], options: tuple[()]
) -> Operands:
    """Return du, dt and dr, None for what is not needed and for dx; sums in a fixed order."""
    u, t, r = saved
    _, needs_u, needs_t, needs_r = needs
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device) if needs_u else None
    sums = None
    dy, flat_u = _flat(cotangents[0]), _flat(u)
    n_batch, length = flat_u.shape
    per_split = BLOCK
    if needs_t or needs_r:
        per_split = rows_per_split(n_batch, length, BLOCK)
    n_splits = triton.cdiv(length, per_split)
    if needs_t or needs_r:
        sums = torch.empty((n_batch, n_splits), dtype=torch.float64, device=u.device)
    if u.numel() > 0:
        _mean_velocity_step_bwd_kernel[(n_batch * n_splits,)](
            dy, flat_u, t, r, du, sums, length, n_splits, per_split, *_strides(dy, flat_u, t, r),
            BLOCK=BLOCK, num_warps=NUM_WARPS["bwd"],
        )  # fmt: skip
    total = None if sums is None else sums.sum(1).to(t.dtype)
    return None, du, -total if needs_t else None, total if needs_r else None


def launch_jvp(
    primals: Operands, tangents: Operands, options: tuple[()], with_value: bool, keep: bool
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return x_r (None without `with_value`) and x_r_dot, both in the shape and dtype of x."""
    x, u, t, r = primals
    x_dot, u_dot, t_dot, r_dot = tangents
    y_dot = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(y_dot) if with_value else None
    if y_dot.numel() > 0:
        x, u, x_dot, u_dot = _flat(x), _flat(u), _flat(x_dot), _flat(u_dot)
        n_batch, length = x.shape
        given = (x, u, t, r, x_dot, u_dot, t_dot, r_dot)
        _mean_velocity_step_jvp_kernel[(n_batch * triton.cdiv(length, BLOCK),)](
            *given, y, y_dot, length, *_strides(*given), BLOCK=BLOCK, num_warps=NUM_WARPS["jvp"]
        )
    return None if y is None else (y,), (y_dot,)
