# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that the C++ CPU kernels are compiled for, checked on its own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.testing import assert_within_budget

ISAS = ("baseline", "avx2", "avx512")

Function = Callable[..., Any]


def use(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Let the kernels be those of one instruction set, or skip the test."""
    if isa not in _ext.load().attention_cpu_isas():
        pytest.skip(f"this processor or this build has no {isa}")
    monkeypatch.setenv("DISCA_CPU_ISA", isa)


def check(
    pair: Function, reference: Function, in_dtype: Function, case: Any, **options: Any
) -> None:
    """Check values, tangents and gradients of the CPU kernels against float64.

    Args:
        pair: the value-and-tangent entry of the operation.
        reference: its specification.
        in_dtype: it, as a model writes it in its dtype.
        case: of its cases.py, without absent operands, and with so many elements that the largest
            of eager's errors, which is the budget, is a typical one.
        **options: of all three.
    """
    primals, tangents, cotangents = case.operands()

    def results(function: Function, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(t.detach()).requires_grad_() for t in primals]
        outputs, dots = function(tuple(leaves), tuple(cast(t) for t in tangents))
        outputs, dots = _several(outputs), _several(dots)
        gradients = torch.autograd.grad(outputs, leaves, [cast(c) for c in cotangents])
        return [*outputs, *dots, *gradients]

    def forward_mode(function: Function) -> Function:
        return lambda p, t: torch.func.jvp(lambda *x: function(*x, **options), p, t)

    ours = results(lambda p, t: pair(p, t, **options, backend="cpu"), torch.clone)
    exact = results(forward_mode(reference), Tensor.double)
    theirs = results(forward_mode(in_dtype), torch.clone)
    for i, (actual, wide, eager) in enumerate(zip(ours, exact, theirs, strict=True)):
        assert_within_budget(actual, wide, eager, name=f"{case} result {i}")


def _several(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results
