# SPDX-License-Identifier: Apache-2.0
"""The fused value-and-tangent kernels of this package, and PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import rule
from disca_kernels.dual.tensor import TangentError, primals_of, split, tangent
from disca_kernels.ops.adaln_modulate import adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.attention import attention, attention_jvp
from disca_kernels.ops.timestep_features import timestep_features, timestep_features_jvp


@rule(attention, fused=True)
def _attention(q: Any, k: Any, v: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return attention_jvp(
        (split(q)[0], split(k)[0], split(v)[0]), (tangent(q), tangent(k), tangent(v)), **options
    )


@rule(adaln_modulate, fused=True)
def _adaln_modulate(x: Any, shift: Any, scale: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return adaln_modulate_jvp(
        (split(x)[0], split(shift)[0], split(scale)[0]),
        (tangent(x), tangent(shift), tangent(scale)),
        **options,
    )


@rule(timestep_features, fused=True)
def _timestep_features(t: Any, dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    value, t_dot = split(t)
    options = primals_of(options)
    if t_dot is None:  # only the width carries a tangent, and it shapes nothing but tangents
        features = timestep_features(value, dim, **options)
        return features, torch.zeros_like(features, requires_grad=False)
    return timestep_features_jvp(value, t_dot, dim, **options)


@rule(functional.scaled_dot_product_attention, fused=True)
def _scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    if dropout_p:
        raise TangentError(
            f"scaled_dot_product_attention with dropout_p={dropout_p} has no tangent rule: the "
            "mask it draws is not visible. Use dropout_p=0, or dropout on its output."
        )
    (q, _), (k, _), (v, _) = split(query), split(key), split(value)
    dots = tangent(query), tangent(key), tangent(value)
    if enable_gqa:
        k, v, k_dot, v_dot = (
            None if x is None else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)
            for x in (k, v, *dots[1:])
        )
        dots = dots[0], k_dot, v_dot
    if attn_mask is None and q.dim() == 4 and not (is_causal and q.shape[-2] != k.shape[-2]):
        return attention_jvp((q, k, v), dots, causal=is_causal, scale=scale)
    mask, mask_dot = split(attn_mask)
    out = functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale
    )
    with torch.no_grad():
        return out, _tangent_by_definition(q, k, v, dots, (mask, mask_dot), is_causal, scale, out)


def _tangent_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dots: tuple[Tensor | None, Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    is_causal: bool,
    scale: float | None,
    out: Tensor,
) -> Tensor:
    """o_dot = P v_dot + (P * s_dot) v - rowsum(P * s_dot) o, with the whole of P in memory."""
    q_dot, k_dot, v_dot = dots
    mask, mask_dot = masks
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT) * factor
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).nan_to_num()
    scores_dot = torch.zeros_like(scores)
    if q_dot is not None:
        scores_dot += (q_dot @ k.mT) * factor
    if k_dot is not None:
        scores_dot += (q @ k_dot.mT) * factor
    if mask_dot is not None:
        scores_dot += mask_dot
    moved = weights * (scores_dot - (weights * scores_dot).sum(-1, keepdim=True))
    out_dot = moved @ v
    return out_dot if v_dot is None else out_dot + weights @ v_dot
