# SPDX-License-Identifier: Apache-2.0
"""Modulation of normalised rows: value, tangent, and the gradients of what modulates them.

`y = (x_hat * weight + bias) * (1 + scale) + shift`, where x_hat are normalised rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disca_kernels.triton_common.rows import load_channels, load_modulation

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def affine(b_x_hat, p_weight, p_bias, o_c, m_c):
    """Return `x_hat * weight + bias`."""
    b_normal = b_x_hat
    if p_weight is not None:
        b_normal = b_normal * load_channels(p_weight, o_c, m_c)
    if p_bias is not None:
        b_normal = b_normal + load_channels(p_bias, o_c, m_c)
    return b_normal


@triton.jit
def affine_tangent(b_x_hat_dot, b_x_hat, p_weight, p_weight_dot, p_bias_dot, o_c, m_c):
    """Return `x_hat_dot * weight + x_hat * weight_dot + bias_dot`."""
    b_dot = b_x_hat_dot
    if p_weight is not None:
        b_dot = b_dot * load_channels(p_weight, o_c, m_c)
    if p_weight_dot is not None:
        b_dot = b_dot + b_x_hat * load_channels(p_weight_dot, o_c, m_c)
    if p_bias_dot is not None:
        b_dot = b_dot + load_channels(p_bias_dot, o_c, m_c)
    return b_dot


@triton.jit
def modulate_tangent(
    b_normal_dot, b_normal, b_gain, p_shift_dot, p_scale_dot, i_b, o_n, o_c,
    stride_hdb, stride_hdn, stride_sdb, stride_sdn, m_rows, m_c, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Return `normal_dot * (1 + scale) + normal * scale_dot + shift_dot`."""
    b_dot = b_normal_dot * b_gain
    if p_scale_dot is not None:
        b_dot = b_dot + b_normal * load_modulation(
            p_scale_dot, i_b, o_n, o_c, stride_sdb, stride_sdn, m_rows, m_c, PER_TOKEN
        )
    if p_shift_dot is not None:
        b_dot = b_dot + load_modulation(
            p_shift_dot, i_b, o_n, o_c, stride_hdb, stride_hdn, m_rows, m_c, PER_TOKEN
        )
    return b_dot


@triton.jit
def store_modulation_gradients(
    b_dy, b_x_hat, p_dshift, p_dscale, p_weight, p_bias, o_out, o_c, m_rows, m_c
):
    """Store the gradients of a modulation per token: dy and dy * (x_hat * weight + bias)."""
    if p_dshift is not None:
        tl.store(p_dshift + o_out, b_dy.to(p_dshift.dtype.element_ty), mask=m_rows)
    if p_dscale is not None:
        b_dscale = b_dy * affine(b_x_hat, p_weight, p_bias, o_c, m_c)
        tl.store(p_dscale + o_out, b_dscale.to(p_dscale.dtype.element_ty), mask=m_rows)


def gradient_buffers(
    rows: Tensor, scale: Tensor, n_splits: int, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    """Allocate what a backward kernel writes of the gradients of shift, scale, weight and bias.

    Args:
        rows: [B, N, C] a tensor of the rows' shape.
        scale: the modulation.
        n_splits: parts of a sample's rows that are summed separately.
        needs: which of the four gradients are needed.

    Returns:
        dshift and dscale per token, or None; then the sums over each split of `dy` and
        `dy * x_hat`, [B, n_splits, C] in float32, or None. If there is a modulation for each token
        the sums are those of `dy * (1 + scale)` instead, which only the affine part needs.
    """
    n_batch, _, n_channels = rows.shape
    per_token = scale.ndim == 3
    dshift, dscale = (
        torch.empty(rows.shape, dtype=scale.dtype, device=rows.device)
        if need and per_token
        else None
        for need in needs[:2]
    )
    sums: list[Tensor | None] = [None, None]
    if any(needs[2:] if per_token else needs):
        shape = (n_batch, n_splits, n_channels)
        sums = [torch.empty(shape, dtype=torch.float32, device=rows.device) for _ in range(2)]
    return dshift, dscale, *sums


def finish_gradients(
    buffers: Gradients,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Turn what a backward kernel wrote into the gradients of shift, scale, weight and bias."""
    dshift, dscale, *sums = buffers
    dweight = dbias = None
    if sums[0] is not None and sums[1] is not None:
        total, correlated = (partial.sum(1) for partial in sums)
        gain: Tensor | float = 1.0
        if scale.ndim == 2:
            gain = 1.0 + scale.float()
            dshift = total
            dscale = correlated if weight is None else correlated * weight.float()
            dscale = dscale if bias is None else dscale + total * bias.float()
        dweight, dbias = ((partial * gain).sum(0) for partial in (correlated, total))
    likes = (scale, scale, weight, bias)
    found = [
        gradient.to(like.dtype) if need and gradient is not None and like is not None else None
        for gradient, like, need in zip((dshift, dscale, dweight, dbias), likes, needs, strict=True)
    ]
    return found[0], found[1], found[2], found[3]
