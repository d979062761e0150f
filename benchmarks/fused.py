# SPDX-License-Identifier: Apache-2.0
"""A fused operation of tokens as a benchmark: against eager PyTorch here, and in `make gpu`.

`bench_<op>.py` and `gpu/ops/<op>.py` describe their operation once, as a `Fused`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from benchmarks.gpu.model import Implementation, Op, Results, Run, own
from benchmarks.slices import Part
from disca_kernels import why_not
from disca_kernels.testing import assert_within_budget

MODES = ("jvp", "fwd", "bwd")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_BACKENDS = ("triton", "cuda", "cpu")


@dataclass(frozen=True)
class Fused:
    """One operation and what it is compared with.

    Attributes:
        name: of the operation.
        function: the public function, `(*operands, **options, backend=...)`.
        pair: its value-and-tangent entry, `(primals, tangents, **options, backend=...)`.
        reference: the specification, `(*operands, **options)`.
        in_dtype: what a model writes in eager PyTorch without this package, alike.
        outputs: names of the outputs.
        operands: names of the operands.
    """

    name: str
    function: Callable[..., Any]
    pair: Callable[..., Any]
    reference: Callable[..., Any]
    in_dtype: Callable[..., Any]
    outputs: Sequence[str]
    operands: Sequence[str]

    def backends(self) -> list[str]:
        """Return the backends that run on this machine's device."""
        probe = torch.empty(1, 1, 1, device=DEVICE)
        return ["eager", *(b for b in _BACKENDS if not why_not(self.name, b, probe))]

    def parts(self, mode: str, operands: Any) -> list[str]:
        """Name the results of a mode."""
        if mode == "fwd":
            return list(self.outputs)
        if mode == "jvp":
            return [*self.outputs, *(f"{name}_dot" for name in self.outputs)]
        return [f"d{self.operands[i]}" for i in _moving(operands)]


def _moving(operands: Any) -> list[int]:
    """Return the operands that have a derivative."""
    return [i for i, t in enumerate(operands.tangents) if t is not None]


def _several(outputs: Any) -> Results:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _call(
    mode: str,
    function: Callable[..., Any],
    pair: Callable[[Results, Any], tuple[Any, Any]],
    operands: Any,
) -> Run:
    """Return what computes the results of a mode."""
    primals, tangents = operands.primals, operands.tangents
    if mode == "fwd":
        return lambda: _several(function(*primals))
    if mode == "jvp":

        def both() -> Results:
            outputs, dots = pair(primals, tangents)
            return *_several(outputs), *_several(dots)

        return both
    given, moving = list(primals), _moving(operands)
    for i in moving:
        given[i] = primals[i].detach().requires_grad_()
    leaves, outputs = [given[i] for i in moving], _several(function(*given))
    # A copy for each call: a gradient may be the cotangent itself, which is no result to compare.
    cotangents = [
        dy.to(y.dtype, copy=True) for y, dy in zip(outputs, operands.cotangents, strict=True)
    ]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _jvp_of(function: Callable[..., Any]) -> Callable[[Results, Any], tuple[Any, Any]]:
    """Return the pair that PyTorch makes of a function, constants left out."""

    def pair(primals: Results, tangents: Any) -> tuple[Any, Any]:
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def of_moving(*leaves: Tensor) -> Any:
            given = list(primals)
            for i, leaf in zip(moving, leaves, strict=True):
                given[i] = leaf
            return function(*given)

        return jvp(of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))

    return pair


def _plain(function: Callable[..., Any], case: Any, mode: str, operands: Any) -> Run:
    def with_options(*primals: Any) -> Any:
        return function(*primals, **case.options)

    return _call(mode, with_options, _jvp_of(with_options), operands)


def _ours(subject: Fused, case: Any, mode: str, operands: Any, backend: str) -> Run:
    def function(*primals: Any) -> Any:
        return subject.function(*primals, **case.options, backend=backend)

    def pair(primals: Results, tangents: Any) -> Any:
        return subject.pair(primals, tangents, **case.options, backend=backend)

    return _call(mode, function, pair, operands)


def _widened(operands: Any) -> Any:
    def wide(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.double() for t in tensors)

    return type(operands)(
        wide(operands.primals), wide(operands.tangents), wide(operands.cotangents)
    )


def parameters(cases: Sequence[Any]) -> list[Any]:
    """Return cases for `pytest.mark.parametrize`; only `make bench` runs more than the first."""
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.large] if i else [])
        for i, case in enumerate(cases)
    ]


def run_case(measure: Callable[..., None], subject: Fused, case: Any, mode: str, impl: str) -> None:
    """Check one case and time it against eager PyTorch, on this machine."""
    operands = case.operands(device=DEVICE)
    reasons = why_not(subject.name, impl, *operands.primals)
    if reasons:
        pytest.skip("; ".join(reasons))
    run = _ours(subject, case, mode, operands, impl)

    def check() -> None:
        exact = _plain(subject.reference, case, mode, _widened(operands))
        yardstick = _plain(subject.reference, case, mode, operands)
        parts = zip(subject.parts(mode, operands), run(), exact(), yardstick(), strict=True)
        for part, *results in parts:
            assert_within_budget(*results, name=f"{subject.name} {part}")

    measure(
        run=run,
        eager=_plain(subject.in_dtype, case, mode, operands),
        check=check,
        bytes_moved=case.bytes_moved(mode),
        flops=case.flops(mode),
        device=DEVICE,
    )


def gpu_operation(subject: Fused, cases: dict[str, list[Any]], compiled_in: str = "second") -> Op:
    """Return what `make gpu` needs to know of an operation.

    Args:
        subject: the operation.
        cases: tier to cases; "dry" is for a machine without GPU.
        compiled_in: the tier in which torch.compile of the eager version is measured too.
    """

    def draw(case: Any, device: torch.device, seed: int) -> Any:
        return case.operands(seed, device)

    def ours(case: Any, mode: str, operands: Any, backend: str) -> Run:
        return _ours(subject, case, mode, operands, backend)

    def eager(case: Any, mode: str, operands: Any) -> Run:
        return _plain(subject.in_dtype, case, mode, operands)

    def compiled(case: Any, mode: str, operands: Any) -> Run:
        torch.compiler.reset()

        def with_options(*primals: Any) -> Any:
            return subject.in_dtype(*primals, **case.options)

        pair = torch.compile(_jvp_of(with_options))
        return _call(mode, torch.compile(with_options), pair, operands)

    def expected(case: Any, mode: str, operands: Any) -> list[Part]:
        results = _plain(subject.reference, case, mode, _widened(operands))()
        names = subject.parts(mode, operands)
        return [Part(name, x.detach()) for name, x in zip(names, results, strict=True)]

    def implementations() -> list[Implementation]:
        return [
            *(own(subject.name, name, MODES, ours) for name in _BACKENDS),
            Implementation("eager", MODES, eager),
            Implementation("torch.compile", MODES, compiled, tiers=(compiled_in,), compiled=True),
        ]

    return Op(subject.name, MODES, cases, draw, implementations, expected)
