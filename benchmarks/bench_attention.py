# SPDX-License-Identifier: Apache-2.0
"""Attention against the same formula in eager PyTorch: value, gradients, value with tangent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import attention, attention_jvp
from disca_kernels.ops.attention.cases import AttentionCase, Operands, attention_in_dtype
from disca_kernels.ops.attention.reference import attention_reference
from disca_kernels.testing import assert_within_budget

Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]

if torch.cuda.is_available():
    DEVICE, IMPLEMENTATIONS = torch.device("cuda"), ["eager", "triton"]
    CASES = [
        AttentionCase(1, 24, 4096, 4096, 64, torch.bfloat16),
        AttentionCase(1, 24, 4096, 4096, 128, torch.bfloat16),
        AttentionCase(1, 24, 4096, 256, 128, torch.bfloat16, lengths=(200,)),
    ]
else:
    DEVICE, IMPLEMENTATIONS = torch.device("cpu"), ["eager"]
    CASES = [
        AttentionCase(64, 4, 36, 36, 24),
        AttentionCase(64, 8, 36, 36, 32, lengths=(36,) * 32 + (33,) * 32),
        AttentionCase(1, 4, 1024, 1024, 64),
    ]


def calls(mode: str, function: Function, pair: Function, operands: Operands) -> Callable:
    """Return what computes the results of a mode: (o,), (dq, dk, dv) or (o, o_dot)."""
    primals, tangents, cotangent, lengths = operands
    if mode == "fwd":
        return lambda: (function(*primals, kv_lengths=lengths),)
    if mode == "jvp":
        return lambda: pair(primals, tangents, kv_lengths=lengths)
    leaves = [x.detach().requires_grad_() for x in primals]
    o = function(*leaves, kv_lengths=lengths)
    return lambda: torch.autograd.grad(o, leaves, cotangent.to(o.dtype), retain_graph=True)


def jvp_of(function: Function) -> Function:
    def pair(primals: Results, tangents: Results, **options: object) -> Results:
        return jvp(lambda *x: function(*x, **options), primals, tangents)

    return pair


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["fwd", "bwd", "jvp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(measure, case: AttentionCase, mode: str, impl: str) -> None:
    operands = case.operands(device=DEVICE)

    def ours(*x: Tensor, **options: object) -> Tensor:
        return attention(*x, **options, backend=impl)

    def our_pair(primals: Results, tangents: Results, **options: object) -> Results:
        return attention_jvp(primals, tangents, **options, backend=impl)

    run = calls(mode, ours, our_pair, operands)
    eager = calls(mode, attention_in_dtype, jvp_of(attention_in_dtype), operands)

    def check() -> None:
        primals, tangents, cotangent, lengths = operands
        wide = Operands(
            tuple(x.double() for x in primals),
            tuple(x.double() for x in tangents),
            cotangent.double(),
            lengths,
        )
        exact = calls(mode, attention_reference, jvp_of(attention_reference), wide)
        for actual, expected, base in zip(run(), exact(), eager(), strict=True):
            assert_within_budget(actual, expected, base, name=f"attention {mode}")

    measure(
        run=run,
        eager=eager,
        check=check,
        bytes_moved=case.bytes_moved(mode),
        flops=case.flops(mode),
        device=DEVICE,
    )
