# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the sinusoidal time features, and their launchers.

The frequencies come from a table that is computed once per device in the same arithmetic as the
reference: an angle is up to 1000 radians, where one rounding of a frequency is already 1e-4.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.ops.timestep_features.reference import frequencies
from disca_kernels.testing.interpreter import prepare_interpreter

prepare_interpreter()

_MAX_BLOCK = 256


@triton.jit
def _timestep_features_fwd_kernel(
    p_t, p_freqs, p_features, stride_t, HALF, DIM, scale, BLOCK: tl.constexpr
):
    """Write [cos(a) | sin(a) | 0 if DIM is odd] with a = (scale t) f."""
    i_b = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < HALF
    t = tl.load(p_t + i_b * stride_t).to(tl.float32)
    # [BLOCK]
    b_angle = t * scale * tl.load(p_freqs + o_f, mask=m_f, other=0.0)
    p_row = p_features + i_b * DIM
    tl.store(p_row + o_f, tl.cos(b_angle), mask=m_f)
    tl.store(p_row + HALF + o_f, tl.sin(b_angle), mask=m_f)
    tl.store(p_row + 2 * HALF + o_f, tl.zeros([BLOCK], tl.float32), mask=o_f < DIM - 2 * HALF)


@triton.jit
def _timestep_features_jvp_kernel(
    p_t, p_t_dot, p_width, p_freqs, p_features, p_features_dot, stride_t, stride_t_dot,
    stride_width, HALF, DIM, scale, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the features (unless None) and t_dot w sin(w h) / (w h) [-sin(a) | cos(a)].

    w = scale f; h is read for each sample from `p_width`, or is `width` if that is None.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f, m_pad = o_f < HALF, o_f < DIM - 2 * HALF
    t = tl.load(p_t + i_b * stride_t).to(tl.float32)
    t_dot = tl.load(p_t_dot + i_b * stride_t_dot).to(tl.float32)
    h = width
    if p_width is not None:
        h = tl.load(p_width + i_b * stride_width).to(tl.float32)
    # [BLOCK]
    b_freqs = tl.load(p_freqs + o_f, mask=m_f, other=0.0)
    b_omega = scale * b_freqs
    b_y = b_omega * h
    b_band = tl.where(b_y == 0.0, 1.0, tl.sin(b_y) / tl.where(b_y == 0.0, 1.0, b_y))
    b_speed = t_dot * (b_omega * b_band)
    b_angle = t * scale * b_freqs
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    b_zero = tl.zeros([BLOCK], tl.float32)
    p_row = p_features_dot + i_b * DIM
    tl.store(p_row + o_f, -b_sin * b_speed, mask=m_f)
    tl.store(p_row + HALF + o_f, b_cos * b_speed, mask=m_f)
    tl.store(p_row + 2 * HALF + o_f, b_zero, mask=m_pad)
    if p_features is not None:
        p_row = p_features + i_b * DIM
        tl.store(p_row + o_f, b_cos, mask=m_f)
        tl.store(p_row + HALF + o_f, b_sin, mask=m_f)
        tl.store(p_row + 2 * HALF + o_f, b_zero, mask=m_pad)


@triton.jit
def _timestep_features_bwd_kernel(
    p_t, p_freqs, p_dfeatures, p_dt, stride_t, stride_db, stride_df, HALF, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dt = sum_f w (cos(a) dsin - sin(a) dcos), the exact derivative."""
    i_b = tl.program_id(0).to(tl.int64)
    t = tl.load(p_t + i_b * stride_t).to(tl.float32)
    p_dfeatures += i_b * stride_db
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, HALF, BLOCK):
        o_f = start + tl.arange(0, BLOCK)
        m_f = o_f < HALF
        # [BLOCK]
        b_freqs = tl.load(p_freqs + o_f, mask=m_f, other=0.0)
        b_dcos = tl.load(p_dfeatures + o_f * stride_df, mask=m_f, other=0.0)
        b_dsin = tl.load(p_dfeatures + (HALF + o_f) * stride_df, mask=m_f, other=0.0)
        b_angle = t * scale * b_freqs
        b_sum += scale * b_freqs * (tl.cos(b_angle) * b_dsin - tl.sin(b_angle) * b_dcos)
    tl.store(p_dt + i_b, tl.sum(b_sum, 0).to(p_dt.dtype.element_ty))


@lru_cache(maxsize=64)
def _table(dim: int, max_period: float, device: torch.device) -> Tensor:
    """Return the float32 frequencies on `device`."""
    return frequencies(dim, max_period, torch.float32, device)


def _block(half: int) -> int:
    return min(max(triton.next_power_of_2(half), 32), _MAX_BLOCK)


Operands = tuple[Tensor, Tensor | None]
Options = tuple[float, int, float, float]
"""Width where there is none per sample, dim, scale, max_period."""


def launch_fwd(operands: Operands, options: Options, keep: bool) -> tuple[Tensor]:
    """Return the features of [B, dim] in float32."""
    t, (_, dim, scale, max_period) = operands[0], options
    features = torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)
    half = dim // 2
    block = _block(half)
    if features.numel():
        _timestep_features_fwd_kernel[(t.shape[0], triton.cdiv(half, block))](
            t, _table(dim, max_period, t.device), features, t.stride(0), half, dim, scale,
            BLOCK=block, num_warps=1,
        )  # fmt: skip
    return (features,)


def launch_jvp(
    primals: Operands,
    tangents: tuple[Tensor | None, None],
    options: Options,
    with_value: bool,
    keep: bool,
) -> tuple[tuple[Tensor] | None, tuple[Tensor]]:
    """Return the features (None unless `with_value`) and their tangent, both [B, dim] float32."""
    (t, widths), t_dot = primals, tangents[0]
    width, dim, scale, max_period = options
    if t_dot is None:
        value = launch_fwd(primals, options, keep)
        return value if with_value else None, (torch.zeros_like(value[0]),)
    features_dot = torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)
    features = torch.empty_like(features_dot) if with_value else None
    half = dim // 2
    block = _block(half)
    if features_dot.numel():
        _timestep_features_jvp_kernel[(t.shape[0], triton.cdiv(half, block))](
            t, t_dot, widths, _table(dim, max_period, t.device), features, features_dot,
            t.stride(0), t_dot.stride(0), 0 if widths is None else widths.stride(0),
            half, dim, scale, width, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return None if features is None else (features,), (features_dot,)


def launch_bwd(
    cotangents: tuple[Tensor], saved: tuple[Tensor], needs: tuple[bool, bool], options: Options
) -> tuple[Tensor, None]:
    """Return dt of [B] in the dtype of t."""
    (dfeatures,), (t,), (_, dim, scale, max_period) = cotangents, saved, options
    dt = torch.empty((t.shape[0],), dtype=t.dtype, device=t.device)
    half = dim // 2
    if dt.numel():
        _timestep_features_bwd_kernel[(t.shape[0],)](
            t, _table(dim, max_period, t.device), dfeatures, dt, t.stride(0),
            *dfeatures.stride(), half, scale, BLOCK=_block(half), num_warps=1,
        )  # fmt: skip
    return dt, None
