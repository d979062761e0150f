# SPDX-License-Identifier: Apache-2.0
"""Attention against the same formula in eager PyTorch: value, gradients, value with tangent.

Beside our backends run PyTorch's fused attention, where it can compute the mode, and the tangent
over a value that is there already ("tangent"), whose eager version is the whole of torch.func.jvp.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.plain import plain_attention
from benchmarks.slices import check_parts, expected_attention
from disca_kernels import attention, attention_jvp, attention_tangent, why_not
from disca_kernels.ops.attention.cases import AttentionCase, Operands, attention_in_dtype
from disca_kernels.ops.attention.reference import attention_reference
from disca_kernels.testing import assert_within_budget

Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]

MODES = ("fwd", "bwd", "jvp", "tangent")
_FEW_KEYS = 256
"""Up to so many keys every row is checked against the error budget, beyond that some rows are."""
_EAGER_MATRICES = {"fwd": 3, "bwd": 5, "jvp": 6, "tangent": 6}
"""Matrices of scores that eager holds at once."""

if torch.cuda.is_available():
    DEVICE, BACKENDS = torch.device("cuda"), ("triton", "cuda")
    SMALL = [AttentionCase(1, 24, 4096, 256, 128, torch.bfloat16, lengths=(200,))]
    LARGE = [AttentionCase(1, 24, 4096, 4096, d, torch.bfloat16) for d in (64, 128)]
else:
    DEVICE, BACKENDS = torch.device("cpu"), ("cpu",)
    SMALL = [
        AttentionCase(64, 4, 36, 36, 24),
        AttentionCase(64, 8, 36, 36, 32, lengths=(36,) * 32 + (33,) * 32),
        AttentionCase(2, 4, 130, 130, 64, torch.bfloat16),
    ]
    LARGE = [
        AttentionCase(1, 8, n, n, d, dtype)
        for n in (1024, 4096, 8192)
        for d in (64, 128)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _affordable(case: AttentionCase, mode: str) -> bool:
    """Leave out what would make `make bench` take more than about eight minutes on two cores."""
    if DEVICE.type == "cuda" or case.n_q <= 1024:
        return True
    if case.dtype == torch.bfloat16 and case.head_dim < 128:
        return False
    if case.n_q <= 4096:
        return True
    return mode == "jvp" or (mode != "tangent" and case.dtype == torch.float32)


def parameters() -> Iterator[Any]:
    """Yield (case, mode, impl)."""
    for case in [*SMALL, *LARGE]:
        for mode in MODES:
            if case in LARGE and not _affordable(case, mode):
                continue
            fused = ("sdpa",) if mode in ("fwd", "bwd") and case.lengths is None else ()
            eager = ("eager",) if case in SMALL else ()
            for impl in (*BACKENDS, *fused, *eager):
                marks = [pytest.mark.large] if case in LARGE else []
                yield pytest.param(case, mode, impl, marks=marks, id=f"{case}-{mode}-{impl}")


def fused(*primals: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """PyTorch's own choice of a fused kernel."""
    assert kv_lengths is None
    return scaled_dot_product_attention(*primals)


def calls(mode: str, function: Function, pair: Function, operands: Operands) -> Callable:
    """Return what computes the results of a mode: (o,), (dq, dk, dv) or (o, o_dot)."""
    primals, tangents, cotangent, lengths = operands
    if mode == "fwd":
        return lambda: (function(*primals, kv_lengths=lengths),)
    if mode in ("jvp", "tangent"):
        return lambda: pair(primals, tangents, kv_lengths=lengths)
    leaves = [x.detach().requires_grad_() for x in primals]
    o = function(*leaves, kv_lengths=lengths)
    return lambda: torch.autograd.grad(o, leaves, cotangent.to(o.dtype), retain_graph=True)


def jvp_of(function: Function) -> Function:
    def pair(primals: Results, tangents: Results, **options: object) -> Results:
        return jvp(lambda *x: function(*x, **options), primals, tangents)

    return pair


def ours(mode: str, backend: str, operands: Operands) -> Callable[[], Results]:
    """Return the call of one of our backends."""
    primals, tangents, _, lengths = operands
    if mode == "tangent":
        o, lse = attention(*primals, kv_lengths=lengths, return_lse=True, backend=backend)
        return lambda: attention_tangent(
            primals, tangents, o, lse, kv_lengths=lengths, backend=backend
        )[:1]

    def value(*x: Tensor, **options: Any) -> Tensor:
        return attention(*x, **options, backend=backend)

    def pair(primals: Results, tangents: Results, **options: Any) -> Results:
        return attention_jvp(primals, tangents, **options, backend=backend)

    return calls(mode, value, pair, operands)


def whole_check(mode: str, run: Callable[[], Results], operands: Operands) -> None:
    """Hold every element to the error budget against float64."""
    primals, tangents, cotangent, lengths = operands
    wide = Operands(
        tuple(x.double() for x in primals),
        tuple(x.double() for x in tangents),
        cotangent.double(),
        lengths,
    )
    exact = calls(mode, attention_reference, jvp_of(attention_reference), wide)()
    base = calls(mode, attention_in_dtype, jvp_of(attention_in_dtype), operands)()
    last = 1 if mode == "tangent" else 0  # of the tangent alone there is no value to compare
    for actual, expected, eager in zip(run(), exact[last:], base[last:], strict=True):
        assert_within_budget(actual, expected, eager, name=f"attention {mode}")


def eager_call(case: AttentionCase, mode: str, operands: Operands) -> Callable[[], Any] | str:
    """Return the eager version, or why it cannot run on this machine."""
    size = max(case.dtype.itemsize, 4) * case.batch * case.heads * case.n_q * case.n_k
    needed, free = _EAGER_MATRICES[mode] * size, _free_memory()
    if needed > free:
        return f"eager needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return calls(mode, plain_attention, jvp_of(plain_attention), operands)


def _free_memory() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info(DEVICE)[0]
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return next(
        int(line.split()[1]) * 1024
        for line in text.splitlines()
        if line.startswith("MemAvailable:")
    )


@pytest.mark.parametrize(("case", "mode", "impl"), list(parameters()))
def test_attention(measure, case: AttentionCase, mode: str, impl: str) -> None:
    operands = case.operands(device=DEVICE)
    if impl == "sdpa":
        run = calls(mode, fused, fused, operands)
    else:
        reasons = why_not("attention", impl, *operands.primals)
        if reasons:
            pytest.skip("; ".join(reasons))
        run = ours(mode, impl, operands)

    def check() -> None:
        if case.n_k <= _FEW_KEYS and impl != "sdpa":  # the budget is ours, not PyTorch's
            whole_check(mode, run, operands)
        else:
            parts = expected_attention(case, mode, operands)
            check_parts(run(), parts, case.dtype)

    measure(
        run=run,
        eager=eager_call(case, mode, operands),
        check=check,
        bytes_moved=case.bytes_moved(mode),
        flops=case.flops(mode),
        device=DEVICE,
        matmul_dtype=case.dtype,
    )
