# SPDX-License-Identifier: Apache-2.0
"""Cases of attention and the ways to call it, for its tests."""

import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import attention, attention_jvp, attention_tangent
from disca_kernels.ops.attention.cases import AttentionCase, Operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "triton", *["cpu"] * (DEVICE == "cpu")]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    AttentionCase(2, 3, 13, 17, 8),
    AttentionCase(3, 5, 1, 70, 16),
    AttentionCase(2, 2, 70, 150, 24),
    AttentionCase(2, 1, 37, 70, 33, lengths=(0, 41)),
    AttentionCase(1, 2, 70, 37, 16, causal=True),
    AttentionCase(2, 1, 37, 70, 80, causal=True, lengths=(3, 70)),
    AttentionCase(1, 1, 20, 40, 256),
    AttentionCase(2, 2, 70, 150, 24, F16),
    AttentionCase(2, 1, 37, 70, 80, F16, causal=True, lengths=(0, 70)),
    AttentionCase(2, 2, 70, 150, 24, BF16),
    AttentionCase(2, 1, 70, 37, 64, BF16, causal=True, lengths=(0, 20)),
    AttentionCase(1, 1, 20, 40, 256, BF16),
    AttentionCase(2, 4, 37, 70, 24, key_heads=2, lengths=(0, 41)),
    AttentionCase(1, 6, 37, 70, 72, BF16, key_heads=1, block_causal=16),
    AttentionCase(2, 2, 70, 37, 96, block_causal=8, lengths=(5, 37)),
    AttentionCase(1, 2, 33, 70, 40, F16, key_heads=2, block_causal=100),
]


def options(case: AttentionCase, operands: Operands) -> dict[str, object]:
    return {"kv_lengths": operands.kv_lengths, **case.masks}


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def small(dtype: torch.dtype = F32) -> tuple[Operands, dict[str, object]]:
    case = AttentionCase(2, 2, 5, 7, 8, dtype, lengths=(0, 6))
    operands = case.operands(device=DEVICE)
    return operands, options(case, operands)


def tangents_by(way: str, operands: Operands, **kwargs: object) -> tuple[Tensor, ...]:
    """Return o and o_dot by one of the ways to a tangent."""
    primals, tangents = operands.primals, operands.tangents
    if way == "pair":
        return attention_jvp(primals, tangents, **kwargs)
    if way == "func.jvp":
        return jvp(lambda *x: attention(*x, **kwargs), primals, tangents)
    o, lse = attention(*primals, **kwargs, return_lse=True)
    return o, attention_tangent(primals, tangents, o, lse, **kwargs)[0]
