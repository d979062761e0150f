# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate against what a DiT block writes in PyTorch: value, gradients, tangent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import adaln_modulate, adaln_modulate_jvp, why_not
from disca_kernels.ops.adaln_modulate.cases import (
    AdalnModulateCase,
    Operands,
    adaln_modulate_in_dtype,
)
from disca_kernels.ops.adaln_modulate.reference import adaln_modulate_reference
from disca_kernels.testing import assert_within_budget

Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]
Pair = Callable[[Results, Results], Results]

if torch.cuda.is_available():
    DEVICE, CANDIDATES = torch.device("cuda"), ["eager", "triton", "cuda"]
    CASES = [
        AdalnModulateCase(1, 32768, 3072, torch.bfloat16),
        AdalnModulateCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        AdalnModulateCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ]
else:
    DEVICE, CANDIDATES = torch.device("cpu"), ["eager", "cpu"]
    CASES = [
        AdalnModulateCase(64, 36, 128),
        AdalnModulateCase(2, 1024, 1536),
        AdalnModulateCase(2, 1024, 1536, torch.bfloat16),
        AdalnModulateCase(2, 1024, 1536, torch.bfloat16, torch.float32),
    ]


def calls(mode: str, function: Function, pair: Pair, operands: Operands) -> Callable[[], Results]:
    """Return what computes the results of a mode: (y,), (dx, dshift, dscale) or (y, y_dot)."""
    primals, tangents, cotangent = operands
    if mode == "fwd":
        return lambda: (function(*primals),)
    if mode == "jvp":
        return lambda: pair(primals, tangents)
    leaves = [t.detach().requires_grad_() for t in primals]
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)


def jvp_of(function: Function) -> Pair:
    return lambda primals, tangents: jvp(function, primals, tangents)


@pytest.mark.parametrize("impl", CANDIDATES)
@pytest.mark.parametrize("mode", ["fwd", "bwd", "jvp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adaln_modulate(measure, case: AdalnModulateCase, mode: str, impl: str) -> None:
    operands = case.operands(device=DEVICE)
    reasons = why_not("adaln_modulate", impl, *operands.primals)
    if reasons:
        pytest.skip("; ".join(reasons))

    def ours(*primals: Tensor) -> Tensor:
        return adaln_modulate(*primals, backend=impl)

    def our_pair(primals: Results, tangents: Results) -> Results:
        return adaln_modulate_jvp(primals, tangents, backend=impl)

    run = calls(mode, ours, our_pair, operands)
    eager = calls(mode, adaln_modulate_in_dtype, jvp_of(adaln_modulate_in_dtype), operands)

    def check() -> None:
        primals, tangents, cotangent = operands
        wide = Operands(
            tuple(t.double() for t in primals),
            tuple(t.double() for t in tangents),
            cotangent.double(),
        )
        reference, pair = adaln_modulate_reference, jvp_of(adaln_modulate_reference)
        exact, base = (calls(mode, reference, pair, given) for given in (wide, operands))
        for actual, expected, yardstick in zip(run(), exact(), base(), strict=True):
            assert_within_budget(actual, expected, yardstick, name=f"adaln_modulate {mode}")

    measure(
        run=run,
        eager=eager,
        check=check,
        bytes_moved=case.bytes_moved(mode),
        flops=case.flops(mode),
        device=DEVICE,
    )
