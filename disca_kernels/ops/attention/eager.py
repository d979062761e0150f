# SPDX-License-Identifier: Apache-2.0
"""Attention in PyTorch operations: what runs without a kernel, made fast for short sequences.

The same results as `reference.py` in fewer passes over the [Nq, Nk] matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import scaled_dot_product_attention

from disca_kernels.ops.attention.reference import (
    MASKED,
    attention_mask,
    clear_padding,
    compute_dtype,
    repeat_heads,
)

_MATMUL_LIMIT = 512 * 512
"""Scores per head up to which saving P beats recomputing it in the backward pass on a CPU."""

_SHORT_LIMIT = 128 * 128
"""Scores per head up to which two matrix products are as fast as PyTorch's attention on a CPU,
which gives 0 for a row whose scores are all NaN."""

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """How the scores are masked and scaled.

    Attributes:
        kv_lengths: [B] number of valid keys, or None.
        block: tokens per block of the causal mask, 0 for none.
        scale: factor of the scores.
    """

    kv_lengths: Tensor | None
    block: int
    scale: float

    def mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return which keys are visible; see `attention_mask`."""
        return attention_mask(q.shape[2], k.shape[2], self.kv_lengths, self.block, q.device)

    def dead_rows(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return where a query sees no key, [B, 1, Nq or 1, 1], or None if no query is so."""
        if mask is None:
            return None
        if q.shape[2] <= k.shape[2]:
            if self.kv_lengths is None:
                return None
            readable = self.kv_lengths.device.type == "cpu" and not _transformed(self.kv_lengths)
            every_key = mask.shape[2] == 1
            if (
                readable
                and every_key
                and not torch.compiler.is_compiling()
                and self.kv_lengths.all()
            ):
                return None
        return ~mask.any(-1, keepdim=True)


def _rows(x: Tensor) -> Tensor:
    """Merge batch and heads and widen: [B, H, N, D] to [B * H, N, D]."""
    return x.to(compute_dtype(x.dtype)).reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


def _transformed(*tensors: Tensor) -> bool:
    """Return whether a `torch.func` transform is at work on one of these."""
    if torch.compiler.is_compiling():
        return False
    return any(is_functorch_wrapped_tensor(x) for x in tensors)


def _scores(q3: Tensor, k3: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the scores of [B * H, Nq, Nk], those of keys that are not visible about -1e30."""
    if mask is None:
        return torch.bmm(q3 * scale, k3.mT)
    bias = torch.zeros(mask.shape, dtype=q3.dtype, device=q3.device).masked_fill(~mask, MASKED)
    # One mask for all samples is broadcast; one for each is repeated for each head.
    heads = q3.shape[0] // mask.shape[0] if mask.shape[0] > 1 else 1
    bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
    return torch.baddbmm(bias, q3, k3.mT, alpha=scale)


def _finish(o: Tensor, like: Tensor, dead: Tensor | None) -> Tensor:
    """Split batch and heads, zero the rows that see no key, cast."""
    o = o.reshape(*like.shape[:3], o.shape[-1])
    if dead is not None:
        o = o.masked_fill(dead, 0.0)
    return o.to(like.dtype)


def _finish_lse(lse: Tensor, like: Tensor, dead: Tensor | None) -> Tensor:
    """Split batch and heads; a row that sees no key has minus infinity."""
    lse = lse.reshape(like.shape[:3])
    return lse if dead is None else lse.masked_fill(dead.squeeze(-1), -torch.inf)


def _tangent(
    p: Tensor, primals: Primals, tangents: Tangents, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `(P * (S_dot - c)) v + P v_dot` of [B * H, Nq, D] and c = rowsum(P * S_dot)."""
    q, k, v = primals
    q_dot, k_dot, v_dot = (None if x is None else _rows(x) for x in tangents)
    s_dot = None
    if q_dot is not None:
        s_dot = torch.bmm(q_dot * scale, k.mT)
    if k_dot is not None:
        q = q * scale
        s_dot = torch.bmm(q, k_dot.mT) if s_dot is None else torch.baddbmm(s_dot, q, k_dot.mT)
    o_dot, c = None, torch.zeros_like(q[..., :1])
    if s_dot is not None:
        c = torch.linalg.vecdot(p, s_dot).unsqueeze(-1)
        h = p * (s_dot - c)
        # c is rounded at the size of a drift; what is left of the mean would meet |o| >> |o_dot|.
        left = h.sum(-1, keepdim=True)
        o_dot = torch.bmm(torch.addcmul(h, p, left, value=-1), v)
        c = c + left
    if v_dot is not None:
        o_dot = torch.bmm(p, v_dot) if o_dot is None else torch.baddbmm(o_dot, p, v_dot)
    return torch.zeros_like(q) if o_dot is None else o_dot, c.squeeze(-1)


def _operands(
    primals: Primals, tangents: Tangents, options: Options
) -> tuple[Tensor | None, Primals, Tangents, Tensor | None]:
    """Return the mask, the operands with padding cleared and heads repeated, and the dead rows."""
    (q, k, v), (q_dot, k_dot, v_dot) = primals, tangents
    mask = options.mask(q, k)
    dead = options.dead_rows(q, k, mask)
    cleared = clear_padding(options.kv_lengths, k, v, k_dot, v_dot)
    k, v, k_dot, v_dot = repeat_heads(q.shape[1], *cleared)
    return mask, (q, k, v), (q_dot, k_dot, v_dot), dead


def _keeps_probabilities(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `forward` computes P as a whole instead of calling PyTorch's attention.

    That one runs one sample at a time under vmap on a CPU.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    explicit = needs_grad or _transformed(q, k, v)
    limit = max(_SHORT_LIMIT, _MATMUL_LIMIT if explicit else 0)
    return q.device.type == "cpu" and q.shape[2] * k.shape[2] <= limit


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Compute attention with PyTorch's own reverse mode; not for use in forward mode."""
    mask, primals, _, dead = _operands((q, k, v), (None, None, None), options)
    if _keeps_probabilities(q, k, v):
        with torch.autocast(q.device.type, enabled=False):
            q3, k3, v3 = map(_rows, primals)
            p = _scores(q3, k3, mask, options.scale).softmax(-1)
            return _finish(torch.bmm(p, v3), q, dead)
    if options.block == 1 and options.kv_lengths is None and q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(*primals, is_causal=True, scale=options.scale)
    o = scaled_dot_product_attention(*primals, mask, scale=options.scale)
    # What PyTorch gives such rows depends on its version and on the device.
    return o if dead is None else o.masked_fill(dead, 0.0)


def forward_with_lse(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Compute attention and the log-sum-exp of the scores, both differentiable."""
    mask, primals, _, dead = _operands((q, k, v), (None, None, None), options)
    with torch.autocast(q.device.type, enabled=False):
        q3, k3, v3 = map(_rows, primals)
        scores = _scores(q3, k3, mask, options.scale)
        o = _finish(torch.bmm(scores.softmax(-1), v3), q, dead)
        return o, _finish_lse(scores.logsumexp(-1), q, dead)


def gradient(
    do: Tensor, dlse: Tensor | None, primals: Primals, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv in differentiable operations, from P computed again."""
    q, k, v = primals
    mask, repeated, _, dead = _operands(primals, (None, None, None), options)
    with torch.autocast(q.device.type, enabled=False):
        q3, k3, v3 = map(_rows, repeated)
        p = _scores(q3, k3, mask, options.scale).softmax(-1)
        do3 = _rows(do if dead is None else do.masked_fill(dead, 0.0))
        dp = torch.bmm(do3, v3.mT)
        delta = (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            if dead is not None:
                dlse = dlse.masked_fill(dead.squeeze(-1), 0.0)
            delta = delta - dlse.to(delta.dtype).reshape(delta.shape)
        ds = p * (dp - delta) * options.scale
        dq, dk, dv = torch.bmm(ds, k3), torch.bmm(ds.mT, q3), torch.bmm(p.mT, do3)
        group = q.shape[1] // max(k.shape[1], 1)
        dk, dv = (x.reshape(*k.shape[:2], group, *k.shape[2:]).sum(2) for x in (dk, dv))
    return _finish(dq, q, None), dk.to(k.dtype), dv.to(v.dtype)


def tangent(primals: Primals, tangents: Tangents, options: Options) -> tuple[Tensor, Tensor]:
    """Compute o_dot and lse_dot alone."""
    q = primals[0]
    mask, primals, tangents, dead = _operands(primals, tangents, options)
    with torch.autocast(q.device.type, enabled=False):
        q3, k3, v3 = map(_rows, primals)
        p = _scores(q3, k3, mask, options.scale).softmax(-1)
        o_dot, c = _tangent(p, (q3, k3, v3), tangents, options.scale)
        c = c.reshape(q.shape[:3])
        c = c if dead is None else c.masked_fill(dead.squeeze(-1), 0.0)
        return _finish(o_dot, q, dead), c


def value_and_tangent(
    primals: Primals, tangents: Tangents, options: Options, with_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute o, lse if wanted, and their tangents; autograd tracks the values alone.

    What autograd keeps is what it keeps of `forward`, so that one can be recomputed for the other.
    """
    q = primals[0]
    if not with_lse and not _keeps_probabilities(*primals):
        o = forward(*primals, options)
        with torch.no_grad():
            return o, None, *tangent(primals, tangents, options)
    mask, primals, tangents, dead = _operands(primals, tangents, options)
    with torch.autocast(q.device.type, enabled=False):
        q3, k3, v3 = map(_rows, primals)
        scores = _scores(q3, k3, mask, options.scale)
        p = scores.softmax(-1)
        o = _finish(torch.bmm(p, v3), q, dead)
        lse = _finish_lse(scores.logsumexp(-1), q, dead) if with_lse else None
        with torch.no_grad():
            o_dot, c = _tangent(p, (q3, k3, v3), tangents, options.scale)
            c = c.reshape(q.shape[:3])
            c = c if dead is None else c.masked_fill(dead.squeeze(-1), 0.0)
            return o, lse, _finish(o_dot, q, dead), c
