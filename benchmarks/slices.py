# SPDX-License-Identifier: Apache-2.0
"""Exact results of attention on a few rows, so that a check fits where the whole would not.

Value, tangent and dq need only their own rows of the softmax. dk and dv need every query's
log-sum-exp and rowsum(do * o), which are computed in float32, a block of queries at a time, and
then a few keys in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from disca_kernels.ops.attention.cases import AttentionCase, Operands
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference

_BLOCK = 1024
_ENDS, _INSIDE = 32, 64

TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
"""Largest relative error of a result; two bfloat16 roundings make 3e-3, tf32 makes 3e-4."""
_ONE_ROW = 10


@dataclass(frozen=True)
class Part:
    """One expected result and where it is found in what an implementation returns.

    Attributes:
        name: of the result.
        expected: exact values, float64 or float32.
        select: takes the same rows out of the whole result.
    """

    name: str
    expected: Tensor
    select: Callable[[Tensor], Tensor] = lambda whole: whole


def chosen_rows(n: int, seed: int, device: torch.device) -> Tensor:
    """Return the first and last rows and some random ones, all rows where there are few."""
    if n <= 2 * _ENDS + _INSIDE:
        return torch.arange(n, device=device)
    generator = torch.Generator().manual_seed(seed)
    inside = _ENDS + torch.randperm(n - 2 * _ENDS, generator=generator)[:_INSIDE].sort().values
    ends = torch.arange(_ENDS)
    return torch.cat([ends, inside, n - _ENDS + ends]).to(device)


def expected_attention(case: AttentionCase, mode: str, operands: Operands) -> list[Part]:
    """Return what a mode of attention must give on some rows of every head.

    Args:
        case: an unmasked case with as many key heads as query heads.
        mode: "fwd", "bwd", "jvp" or "tangent".
        operands: the inputs of the call that is checked.

    Returns:
        o; dq, dk, dv; o and o_dot; or o_dot.
    """
    if case.causal or case.block_causal or case.lengths or case.key_heads:
        raise ValueError(f"only unmasked attention without groups is checked by rows, got {case}")
    device = operands.primals[0].device
    rows = chosen_rows(case.n_q, 1, device)
    keys = chosen_rows(case.n_k, 2, device)
    per_head = []
    for b in range(case.batch):
        for h in range(case.heads):
            here = (slice(b, b + 1), slice(h, h + 1))
            per_head.append(_one_head(mode, _head(operands, here), rows, keys))
    names = {"fwd": ["o"], "jvp": ["o", "o_dot"], "tangent": ["o_dot"], "bwd": ["dq", "dk", "dv"]}
    shape = (case.batch, case.heads)
    return [
        Part(name, torch.cat(found).unflatten(0, shape).squeeze(2), _taker(name, rows, keys))
        for name, found in zip(names[mode], zip(*per_head, strict=True), strict=True)
    ]


def _taker(name: str, rows: Tensor, keys: Tensor) -> Callable[[Tensor], Tensor]:
    index = keys if name in ("dk", "dv") else rows
    return lambda whole: whole[:, :, index]


def _head(operands: Operands, here: tuple[slice, slice]) -> Operands:
    primals, tangents, cotangent, lengths = operands
    q, k, v = (x[here] for x in primals)
    q_dot, k_dot, v_dot = (x[here] for x in tangents)
    return Operands((q, k, v), (q_dot, k_dot, v_dot), cotangent[here], lengths)


def _one_head(mode: str, head: Operands, rows: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.double() for x in head.primals)
    if mode == "fwd":
        return (attention_reference(q[:, :, rows], k, v),)
    if mode in ("jvp", "tangent"):
        q_dot, k_dot, v_dot = (x.double() for x in head.tangents)
        primals, tangents = (q[:, :, rows], k, v), (q_dot[:, :, rows], k_dot, v_dot)
        o, o_dot = attention_jvp_reference(primals, tangents)[:2]
        return (o, o_dot) if mode == "jvp" else (o_dot,)
    do = head.cotangent.double()
    leaf = q[:, :, rows].requires_grad_()
    [dq] = torch.autograd.grad(attention_reference(leaf, k, v), leaf, do[:, :, rows])
    lse, delta = _row_sums(head)
    scale = q.shape[-1] ** -0.5
    k, v = k[:, :, keys], v[:, :, keys]
    p = torch.exp(q @ k.mT * scale - lse)
    ds = p * (do @ v.mT - delta)
    return dq, ds.mT @ q * scale, p.mT @ do


def _row_sums(head: Operands) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp and rowsum(do * o) of every query, [1, 1, Nq, 1] in float64."""
    q, k, v = (x.float() for x in head.primals)
    do = head.cotangent.float()
    lse, delta = [], []
    for start in range(0, q.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = q[:, :, block] @ k.mT * q.shape[-1] ** -0.5
        lse.append(scores.logsumexp(-1, keepdim=True))
        o = (scores - lse[-1]).exp() @ v
        delta.append((do[:, :, block] * o).sum(-1, keepdim=True))
    return torch.cat(lse, 2).double(), torch.cat(delta, 2).double()


def check_parts(results: tuple[Tensor, ...], parts: list[Part], dtype: torch.dtype) -> float:
    """Return the largest relative error of the results, each ||actual - expected|| / ||expected||.

    Args:
        results: what an implementation returned, in the order of `parts`.
        parts: what is expected of it.
        dtype: of the inputs; it sets the tolerance.

    Raises:
        AssertionError: a result is missing, has another shape, is not finite or is wrong, as a
            whole or in one row (then beyond ten times the tolerance).
    """
    tolerance = TOLERANCES[dtype]
    if len(results) != len(parts):
        raise AssertionError(f"{len(results)} results, expected {[p.name for p in parts]}")
    worst = 0.0
    for whole, part in zip(results, parts, strict=True):
        actual, expected = part.select(whole).detach().double(), part.expected.double()
        if actual.shape != expected.shape:
            raise AssertionError(f"{part.name}: shape {[*actual.shape]}, not {[*expected.shape]}")
        if not whole.isfinite().all():
            raise AssertionError(f"{part.name}: NaN or infinity in the result")
        error = (actual - expected).reshape(-1, expected.shape[-1]).norm(dim=-1)
        size = expected.reshape(-1, expected.shape[-1]).norm(dim=-1).square().mean().sqrt()
        relative = (error.square().mean().sqrt() / size).item()
        one_row = (error.max() / size).item()
        if not (relative <= tolerance and one_row <= _ONE_ROW * tolerance):
            raise AssertionError(
                f"{part.name}: relative error {relative:.2e}, of the worst row {one_row:.2e}; "
                f"allowed are {tolerance:.0e} and {_ONE_ROW * tolerance:.0e}"
            )
        worst = max(worst, relative)
    return worst
