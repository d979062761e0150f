# SPDX-License-Identifier: Apache-2.0
"""Attention: the fused value-and-tangent kernel of this package, and PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import rule
from disca_kernels.dual.tensor import TangentError, split, tangent
from disca_kernels.ops.attention import attention, attention_jvp


@rule(attention, fused=True)
def _attention(q: Any, k: Any, v: Any, *, primal: str = "own", **options: Any) -> Any:
    if primal != "own":
        raise TangentError(
            f"attention with primal={primal!r} inside dual.jvp: value and tangent come from one "
            "kernel there. Leave primal out, or use torch.func.jvp."
        )
    primals, dots = (split(q)[0], split(k)[0], split(v)[0]), (tangent(q), tangent(k), tangent(v))
    o, o_dot, *rest = attention_jvp(primals, dots, **options)
    return ((o, rest[0]), (o_dot, rest[1])) if rest else (o, o_dot)


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
    (q, q_dot), (k, k_dot), (v, v_dot) = split(query), split(key), split(value)
    mask, mask_dot = split(attn_mask)
    if mask is None and _fits_our_attention(q, k, v, is_causal, enable_gqa):
        return attention_jvp((q, k, v), (q_dot, k_dot, v_dot), causal=is_causal, scale=scale)
    if enable_gqa:
        k, k_dot, v, v_dot = (_repeat_heads(x, q.shape[-3]) for x in (k, k_dot, v, v_dot))
    dots = q_dot, k_dot, v_dot
    out = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    with torch.no_grad():
        return out, _tangent_by_definition((q, k, v), dots, mask, mask_dot, factor)


def _repeat_heads(x: Tensor | None, heads: int) -> Tensor | None:
    return None if x is None else x.repeat_interleave(heads // x.shape[-3], -3)


def _fits_our_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, grouped: bool) -> bool:
    """Four dimensions without broadcasting; PyTorch aligns a causal mask to the top left."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and (q.shape[1] == k.shape[1] or (grouped and q.shape[1] % k.shape[1] == 0))
        and q.shape[-1] == v.shape[-1]
        and not (is_causal and q.shape[-2] != k.shape[-2])
    )


def _tangent_by_definition(
    primals: tuple[Tensor, Tensor, Tensor],
    dots: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    mask_dot: Tensor | None,
    scale: float,
) -> Tensor:
    """P v_dot + (P * (s_dot - rowsum(P * s_dot))) v, with the whole of P in memory."""
    # float32 inside, as the kernels do; the caller casts.
    q, k, v, q_dot, k_dot, v_dot = (
        x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x
        for x in (*primals, *dots)
    )
    scores = (q @ k.mT) * scale  # type: ignore[union-attr, operator]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1).nan_to_num()  # a row without a key has weights 0
    scores_dot = torch.zeros_like(scores) if mask_dot is None else mask_dot.expand_as(scores)
    if q_dot is not None:
        scores_dot = scores_dot + (q_dot @ k.mT) * scale  # type: ignore[union-attr]
    if k_dot is not None:
        scores_dot = scores_dot + (q @ k_dot.mT) * scale  # type: ignore[operator]
    centred = scores_dot - (weights * scores_dot).sum(-1, keepdim=True)
    out_dot: Tensor = (weights * centred) @ v  # type: ignore[operator]
    return out_dot if v_dot is None else out_dot + weights @ v_dot
