# SPDX-License-Identifier: Apache-2.0
"""Eager specification of softmax attention: value, tangent, log-sum-exp and gradient."""

from typing import Any

import torch
from torch import Tensor

MASKED = -1e30
"""Stands for minus infinity in a score: exp of the difference is exactly 0, and never NaN."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the scores, `1 / sqrt(head_dim)` unless the caller chose one."""
    return head_dim**-0.5 if scale is None else float(scale)


def resolve_block(causal: bool, block_causal: int | None) -> int:
    """Return tokens per block of the causal mask: 1 for `causal`, 0 without a causal mask."""
    return int(causal) if block_causal is None else block_causal


def attention_mask(
    q_length: int,
    k_length: int,
    kv_lengths: Tensor | None,
    block: int,
    device: torch.device,
) -> Tensor | None:
    """Return which keys a query may see, or None when it may see all of them.

    Args:
        q_length: number of queries, Nq.
        k_length: number of keys, Nk.
        kv_lengths: [B] number of valid keys of each sample, or None.
        block: tokens per block of the causal mask; 0: none. Query i sees only keys
            j < (floor((i + Nk - Nq) / block) + 1) * block.
        device: where the mask is made.

    Returns:
        bool, [B, 1, 1, Nk], [1, 1, Nq, Nk] or [B, 1, Nq, Nk]; True means visible.
    """
    if kv_lengths is None and not block:
        return None
    o_k = torch.arange(k_length, device=device)
    mask: Tensor | None = None
    if kv_lengths is not None:
        mask = (o_k < kv_lengths.to(device)[:, None])[:, None, None, :]
    if block:
        position = torch.arange(q_length, device=device) + (k_length - q_length)
        stop = (position.div(block, rounding_mode="floor") + 1) * block
        visible = (o_k < stop[:, None])[None, None]
        mask = visible if mask is None else mask & visible
    return mask


def clear_padding(kv_lengths: Tensor | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return [B, Hk, Nk, D] tensors with 0 beyond the lengths: a weight of 0 times NaN is NaN."""
    if kv_lengths is None:
        return tensors
    n_keys = next((x.shape[2] for x in tensors if x is not None), 0)
    o_k = torch.arange(n_keys, device=kv_lengths.device)
    padding = (o_k >= kv_lengths[:, None])[:, None, :, None]
    return tuple(None if x is None else x.masked_fill(padding, 0.0) for x in tensors)


def repeat_heads(heads: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Repeat grouped key heads of [B, Hk, Nk, D] for the query heads that read them."""
    return tuple(
        x if x is None or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
        for x in tensors
    )


def probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of `scores` over the visible keys; a row that sees none is 0."""
    if mask is None:
        return scores.softmax(-1)
    p = scores.masked_fill(~mask, MASKED).softmax(-1)
    # Without a visible key the row came out uniform: every score was the same large number.
    return p.masked_fill(~mask, 0.0)


def log_sum_exp(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log-sum-exp of the visible scores of each row; minus infinity if there is none."""
    if mask is None:
        return scores.logsumexp(-1)
    lse = scores.masked_fill(~mask, MASKED).logsumexp(-1)
    return lse.masked_fill(~mask.any(-1), -torch.inf)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute `softmax(scale * q @ k^T) @ v` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        q: [B, H, Nq, D] queries.
        k: [B, Hk, Nk, D] keys; H is a multiple of Hk, and query head h reads key head
            h // (H // Hk).
        v: [B, Hk, Nk, D] values.
        kv_lengths: [B] number of valid keys, the first ones, of each sample; None: all.
        causal: query i sees only keys j <= i + Nk - Nq.
        block_causal: query i sees only keys j < (floor((i + Nk - Nq) / block_causal) + 1) *
            block_causal.
        scale: factor of the scores, `1 / sqrt(D)` by default.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        o [B, H, Nq, D] in the dtype of `q`, 0 in rows that see no key; with `return_lse` also lse
        [B, H, Nq], float32 (float64 inputs: float64), minus infinity in such rows.
    """
    wide = compute_dtype(q.dtype)
    scale = resolve_scale(scale, q.shape[-1])
    block = resolve_block(causal, block_causal)
    mask = attention_mask(q.shape[-2], k.shape[-2], kv_lengths, block, q.device)
    k, v = repeat_heads(q.shape[1], *clear_padding(kv_lengths, k, v))
    scores = (q.to(wide) * scale) @ k.to(wide).mT
    o = (probabilities(scores, mask) @ v.to(wide)).to(q.dtype)
    return (o, log_sum_exp(scores, mask)) if return_lse else o


def attention_jvp_reference(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    kv_lengths: Tensor | None = None,
    causal: bool = False,
    block_causal: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Compute attention and, by the centred formula, its directional derivative.

    With the scores S, P = softmax(S), S_dot = scale * (q_dot k^T + q k_dot^T) and the row means
    c = rowsum(P * S_dot),

        o = P v,    o_dot = (P * (S_dot - c)) v + P v_dot,    lse_dot = c

    Args:
        primals: `(q, k, v)` as in `attention_reference`.
        tangents: `(q_dot, k_dot, v_dot)`, each of its primal's shape, or None for zero.
        kv_lengths: as in `attention_reference`.
        causal: as in `attention_reference`.
        block_causal: as in `attention_reference`.
        scale: as in `attention_reference`.
        return_lse: whether to return the log-sum-exp of the scores and its tangent too.

    Returns:
        `(o, o_dot)`, both [B, H, Nq, D] in the dtype of `q`; with `return_lse`
        `(o, o_dot, lse, lse_dot)`.
    """
    dtype = primals[0].dtype
    wide = compute_dtype(dtype)
    q, k, v = (x.to(wide) for x in primals)
    q_dot, k_dot, v_dot = (None if x is None else x.to(wide) for x in tangents)
    scale = resolve_scale(scale, q.shape[-1])
    block = resolve_block(causal, block_causal)
    mask = attention_mask(q.shape[-2], k.shape[-2], kv_lengths, block, q.device)
    k, v, k_dot, v_dot = repeat_heads(q.shape[1], *clear_padding(kv_lengths, k, v, k_dot, v_dot))
    scores = (q * scale) @ k.mT
    p = probabilities(scores, mask)
    o = p @ v
    o_dot, c = torch.zeros_like(o), torch.zeros_like(o[..., :1])
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
    pair = o.to(dtype), o_dot.to(dtype)
    return (*pair, log_sum_exp(scores, mask), c.squeeze(-1)) if return_lse else pair
