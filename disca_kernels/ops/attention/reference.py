# SPDX-License-Identifier: Apache-2.0
"""Eager specification of softmax attention: value, tangent and gradient."""

import torch
from torch import Tensor

_MASKED = -1e30
"""Stands for minus infinity in a score: exp of the difference is exactly 0, and never NaN."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the scores, `1 / sqrt(head_dim)` unless the caller chose one."""
    return head_dim**-0.5 if scale is None else float(scale)


def attention_mask(
    q_length: int,
    k_length: int,
    kv_lengths: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Return which keys a query may see, or None when it may see all of them.

    Args:
        q_length: number of queries, Nq.
        k_length: number of keys, Nk.
        kv_lengths: [B] number of valid keys of each sample, or None.
        causal: whether query i sees only keys j <= i + Nk - Nq (the last query sees every key).
        device: where the mask is made.

    Returns:
        bool, [B, 1, 1, Nk], [1, 1, Nq, Nk] or [B, 1, Nq, Nk]; True means visible.
    """
    if kv_lengths is None and not causal:
        return None
    o_k = torch.arange(k_length, device=device)
    mask: Tensor | None = None
    if kv_lengths is not None:
        mask = (o_k < kv_lengths.to(device)[:, None])[:, None, None, :]
    if causal:
        o_q = torch.arange(q_length, device=device)
        visible = (o_k <= o_q[:, None] + (k_length - q_length))[None, None]
        mask = visible if mask is None else mask & visible
    return mask


def probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of `scores` over the visible keys; a row that sees none is 0."""
    if mask is None:
        return scores.softmax(-1)
    p = scores.masked_fill(~mask, _MASKED).softmax(-1)
    # Without a visible key the row came out uniform: every score was the same large number.
    return p.masked_fill(~mask, 0.0)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute `softmax(scale * q @ k^T) @ v` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        q: [B, H, Nq, D] queries.
        k: [B, H, Nk, D] keys.
        v: [B, H, Nk, D] values.
        kv_lengths: [B] number of valid keys, the first ones, of each sample; None: all.
        causal: query i sees only keys j <= i + Nk - Nq.
        scale: factor of the scores, `1 / sqrt(D)` by default.

    Returns:
        [B, H, Nq, D] in the dtype of `q`; 0 in rows that see no key.
    """
    wide = compute_dtype(q.dtype)
    scale = resolve_scale(scale, q.shape[-1])
    mask = attention_mask(q.shape[-2], k.shape[-2], kv_lengths, causal, q.device)
    p = probabilities((q.to(wide) * scale) @ k.to(wide).mT, mask)
    return (p @ v.to(wide)).to(q.dtype)


def attention_jvp_reference(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and, by the centred formula, its directional derivative.

    With the scores S, P = softmax(S), S_dot = scale * (q_dot k^T + q k_dot^T) and the row means
    c = rowsum(P * S_dot),

        o = P v,    o_dot = (P * (S_dot - c)) v + P v_dot

    Args:
        primals: `(q, k, v)` as in `attention_reference`.
        tangents: `(q_dot, k_dot, v_dot)`, each of its primal's shape, or None for zero.
        kv_lengths: as in `attention_reference`.
        causal: as in `attention_reference`.
        scale: as in `attention_reference`.

    Returns:
        `(o, o_dot)`, both [B, H, Nq, D] in the dtype of `q`.
    """
    wide = compute_dtype(primals[0].dtype)
    q, k, v = (x.to(wide) for x in primals)
    q_dot, k_dot, v_dot = (None if x is None else x.to(wide) for x in tangents)
    scale = resolve_scale(scale, q.shape[-1])
    mask = attention_mask(q.shape[-2], k.shape[-2], kv_lengths, causal, q.device)
    p = probabilities((q * scale) @ k.mT, mask)
    o = p @ v
    o_dot = torch.zeros_like(o)
    if q_dot is not None or k_dot is not None:
        s_dot = torch.zeros_like(p)
        if q_dot is not None:
            s_dot = s_dot + (q_dot * scale) @ k.mT
        if k_dot is not None:
            s_dot = s_dot + (q * scale) @ k_dot.mT
        c = (p * s_dot).sum(-1, keepdim=True)
        o_dot = o_dot + (p * (s_dot - c)) @ v
    if v_dot is not None:
        o_dot = o_dot + p @ v_dot
    dtype = primals[0].dtype
    return o.to(dtype), o_dot.to(dtype)
