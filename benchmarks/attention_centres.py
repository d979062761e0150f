# SPDX-License-Identifier: Apache-2.0
"""Rules for centring the tangent of attention, with the roundings that a GPU kernel makes.

Every function takes (q, k, v) and (q_dot, k_dot, v_dot) of [1, 1, N, D] in one dtype and returns
o_dot. The operands of a product are rounded to that dtype, sums and everything else are float32.
They exist to compare rules with one another; the C++ kernels do what
`checked_tangent` does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from disca_kernels.ops.attention.cases_drift import Triple

BLOCK = 64
SAMPLE = 64
TAU = 1.5
FP16_SCALE = 16.0
"""Brings weights that come from a log-sum-exp into float16's normal range."""


class Scores(NamedTuple):
    """S, S_dot, V and V_dot in float32, the last two [Nk, D]; `rounded` rounds as operands are."""

    s: Tensor
    s_dot: Tensor
    v: Tensor
    v_dot: Tensor
    dtype: torch.dtype

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()


class Checked(NamedTuple):
    """A tangent about a sampled centre.

    Attributes:
        o_dot: the tangent.
        c: [Nq, 1] the mean of S_dot.
        miss: estimate of the rounding error that the centre's error added, relative to o_dot, in
            units of the rounding unit; above `TAU` a tile is computed again.
    """

    o_dot: Tensor
    c: Tensor
    miss: float


def scores(primals: Triple, tangents: Triple) -> Scores:
    q, k, v, q_dot, k_dot, v_dot = (x[0, 0].float() for x in (*primals, *tangents))
    scale = float(q.shape[-1] ** -0.5)
    s_dot = scale * (q_dot @ k.mT + q @ k_dot.mT)
    return Scores(scale * (q @ k.mT), s_dot, v, v_dot, primals[0].dtype)


def _value(x: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Return P from an exact log-sum-exp, o rounded to the dtype, and o with what that lost."""
    wide = x.s.double()
    o = (wide.softmax(-1) @ x.v.double()).float()
    p = (x.s - wide.logsumexp(-1, keepdim=True).float()).exp()
    return p, x.rounded(o), x.rounded(o) + x.rounded(o - x.rounded(o))


def fixed_tangent(primals: Triple, tangents: Triple, centre: str, exact_o: bool = True) -> Tensor:
    """About a centre chosen before the loop, the mean subtracted unrounded: P (S_dot - c0) V - d O.

    `centre` is "none", "first block" (the P-weighted mean of S_dot over the first 64 keys) or
    "mean key" (the mean of S_dot over all keys, unweighted).
    """
    x = scores(primals, tangents)
    p, o_rounded, o_wide = _value(x)
    c = torch.zeros_like(p[:, :1])
    if centre == "first block":
        weight = p[:, :BLOCK].sum(1, keepdim=True)
        c = (p * x.s_dot)[:, :BLOCK].sum(1, keepdim=True) / weight.clamp_min(1e-30)
    if centre == "mean key":
        c = x.s_dot.mean(1, keepdim=True)
    h = p * (x.s_dot - c)
    o = o_wide if exact_o else o_rounded
    o_dot = x.rounded(h) @ x.v + x.rounded(p) @ x.v_dot - h.sum(1, keepdim=True) * o
    return o_dot.to(x.dtype)[None, None]


def running_tangent(primals: Triple, tangents: Triple) -> Tensor:
    """About the running mean, as Welford's algorithm computes a covariance."""
    x = scores(primals, tangents)
    rows = x.s.shape[0]
    m, total, c = torch.full((rows, 1), -torch.inf), torch.zeros(rows, 1), torch.zeros(rows, 1)
    o, t = torch.zeros(rows, x.v.shape[1]), torch.zeros(rows, x.v.shape[1])
    for start in range(0, x.s.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        s, v = x.s[:, block], x.v[block]
        m_new = torch.maximum(m, s.amax(1, keepdim=True))
        alpha, p, m = (m - m_new).exp(), (s - m_new).exp(), m_new
        total, o, t = total * alpha + p.sum(1, keepdim=True), o * alpha, t * alpha
        h = x.s_dot[:, block] - c
        moved = (p * h).sum(1, keepdim=True) / total
        c, t = c + moved, t - moved * o
        o = o + x.rounded(p) @ v
        t = t + x.rounded(p * (h - moved)) @ v + x.rounded(p) @ x.v_dot[block]
    return (t / total).to(x.dtype)[None, None]


def sampled_tangent(
    primals: Triple, tangents: Triple, c: Tensor | None = None, exact_o: bool = True
) -> Checked:
    """About the mean over a sample of the keys, subtracted with the sum of the rounded products.

    Args:
        primals: the operands.
        tangents: their tangents.
        c: [Nq, 1] a better centre, as the second round of a tile has it.
        exact_o: whether what o lost to rounding is known.
    """
    x = scores(primals, tangents)
    p, o_rounded, o_wide = _value(x)
    chosen = slice(None, None, max(1, -(-x.s.shape[1] // SAMPLE)))
    if c is None:
        c = (x.s[:, chosen].softmax(1) * x.s_dot[:, chosen]).sum(1, keepdim=True)
    spread = x.v[chosen].var(0, correction=0).sum()
    factor = FP16_SCALE if x.dtype == torch.float16 else 1.0
    h = x.s_dot - c
    products = x.rounded(factor * p * h)
    weights = x.rounded(factor * p)
    r = products.sum(1, keepdim=True) / factor
    o = o_wide if exact_o else o_rounded
    o_dot = (products @ x.v + weights @ x.v_dot) / factor - r * o
    delta, n0 = (p * h).sum(1), p.square().sum(1)
    extra = (delta.square() * n0 * (1 - n0).square() * spread).sum()
    miss = float((extra / o_dot.square().sum()).sqrt())
    return Checked(o_dot.to(x.dtype)[None, None], c + delta[:, None], miss)


def checked_tangent(primals: Triple, tangents: Triple) -> Tensor:
    """`sampled_tangent`, computed again about the mean it found if its centre was a bad guess."""
    first = sampled_tangent(primals, tangents)
    if first.miss <= TAU:
        return first.o_dot
    return sampled_tangent(primals, tangents, first.c).o_dot
