# SPDX-License-Identifier: Apache-2.0
"""Attention in PyTorch operations: what runs without a kernel, made fast for short sequences.

The same results as `reference.py` in fewer passes over the [Nq, Nk] matrices.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import scaled_dot_product_attention

from disca_kernels.ops.attention.reference import attention_mask, compute_dtype

_MASKED = -1e30
_MATMUL_LIMIT = 512 * 512
"""Scores per head up to which saving P beats recomputing it in the backward pass on a CPU."""

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def _rows(x: Tensor) -> Tensor:
    """Merge batch and heads and widen: [B, H, N, D] to [B * H, N, D]."""
    return x.to(compute_dtype(x.dtype)).reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


def _transformed(*tensors: Tensor) -> bool:
    """Return whether a `torch.func` transform is at work on one of these."""
    if torch.compiler.is_compiling():
        return False
    return any(is_functorch_wrapped_tensor(x) for x in tensors)


def _dead_rows(
    q: Tensor, k: Tensor, kv_lengths: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Return where a query sees no key, [B, 1, Nq or 1, 1], or None if no query is so."""
    if mask is None:
        return None
    if q.shape[2] <= k.shape[2]:
        if kv_lengths is None:
            return None
        readable = kv_lengths.device.type == "cpu" and not _transformed(kv_lengths)
        every_key = mask.shape[2] == 1
        if readable and every_key and not torch.compiler.is_compiling() and kv_lengths.all():
            return None
    return ~mask.any(-1, keepdim=True)


def _probabilities(q3: Tensor, k3: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return P of [B * H, Nq, Nk] from rows; a row that sees no key comes out uniform, not 0."""
    if mask is None:
        return torch.bmm(q3 * scale, k3.mT).softmax(-1)
    bias = torch.zeros(mask.shape, dtype=q3.dtype, device=q3.device).masked_fill(~mask, _MASKED)
    # One mask for all samples is broadcast; one for each is repeated for each head.
    heads = q3.shape[0] // mask.shape[0] if mask.shape[0] > 1 else 1
    bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, q3, k3.mT, alpha=scale).softmax(-1)


def _finish(o: Tensor, like: Tensor, dead: Tensor | None) -> Tensor:
    """Split batch and heads, zero the rows that see no key, cast."""
    o = o.reshape(*like.shape[:3], o.shape[-1])
    if dead is not None:
        o = o.masked_fill(dead, 0.0)
    return o.to(like.dtype)


def _tangent(p: Tensor, primals: Primals, tangents: Tangents, scale: float) -> Tensor:
    """Return `(P * (S_dot - c)) v + P v_dot` of [B * H, Nq, D] with c = rowsum(P * S_dot)."""
    q, k, v = primals
    q_dot, k_dot, v_dot = (None if x is None else _rows(x) for x in tangents)
    s_dot = None
    if q_dot is not None:
        s_dot = torch.bmm(q_dot * scale, k.mT)
    if k_dot is not None:
        q = q * scale
        s_dot = torch.bmm(q, k_dot.mT) if s_dot is None else torch.baddbmm(s_dot, q, k_dot.mT)
    o_dot = None
    if s_dot is not None:
        c = torch.linalg.vecdot(p, s_dot).unsqueeze(-1)
        o_dot = torch.bmm(p * (s_dot - c), v)
    if v_dot is not None:
        o_dot = torch.bmm(p, v_dot) if o_dot is None else torch.baddbmm(o_dot, p, v_dot)
    return torch.zeros_like(q) if o_dot is None else o_dot


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Compute attention with PyTorch's own reverse mode; not for use in forward mode."""
    mask = attention_mask(q.shape[2], k.shape[2], kv_lengths, causal, q.device)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    short = q.device.type == "cpu" and q.shape[2] * k.shape[2] <= _MATMUL_LIMIT
    # PyTorch's attention on a CPU runs one sample at a time under vmap.
    if (needs_grad or _transformed(q, k, v)) and short:
        dead = _dead_rows(q, k, kv_lengths, mask)
        with torch.autocast(q.device.type, enabled=False):
            p = _probabilities(_rows(q), _rows(k), mask, scale)
            return _finish(torch.bmm(p, _rows(v)), q, dead)
    if causal and kv_lengths is None and q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)


def gradient(
    do: Tensor, primals: Primals, kv_lengths: Tensor | None, causal: bool, scale: float
) -> Primals:
    """Compute dq, dk and dv in differentiable operations, from P computed again."""
    q, k, v = primals
    mask = attention_mask(q.shape[2], k.shape[2], kv_lengths, causal, q.device)
    dead = _dead_rows(q, k, kv_lengths, mask)
    with torch.autocast(q.device.type, enabled=False):
        q3, k3, v3 = (_rows(x) for x in primals)
        p = _probabilities(q3, k3, mask, scale)
        do3 = _rows(do if dead is None else do.masked_fill(dead, 0.0))
        dp = torch.bmm(do3, v3.mT)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq, dk, dv = torch.bmm(ds, k3), torch.bmm(ds.mT, q3), torch.bmm(p.mT, do3)
    return _finish(dq, q, None), _finish(dk, k, None), _finish(dv, v, None)


def tangent(
    primals: Primals, tangents: Tangents, kv_lengths: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Compute o_dot alone."""
    q, k, v = primals
    mask = attention_mask(q.shape[2], k.shape[2], kv_lengths, causal, q.device)
    with torch.autocast(q.device.type, enabled=False):
        rows = _rows(q), _rows(k), _rows(v)
        p = _probabilities(*rows[:2], mask, scale)
        return _finish(_tangent(p, rows, tangents, scale), q, _dead_rows(q, k, kv_lengths, mask))


def value_and_tangent(
    primals: Primals, tangents: Tangents, kv_lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its tangent from one softmax; autograd tracks the value alone."""
    q, k, v = primals
    mask = attention_mask(q.shape[2], k.shape[2], kv_lengths, causal, q.device)
    dead = _dead_rows(q, k, kv_lengths, mask)
    with torch.autocast(q.device.type, enabled=False):
        rows = _rows(q), _rows(k), _rows(v)
        p = _probabilities(*rows[:2], mask, scale)
        o = _finish(torch.bmm(p, rows[2]), q, dead)
        with torch.no_grad():
            o_dot = _finish(_tangent(p, rows, tangents, scale), q, dead)
    return o, o_dot
