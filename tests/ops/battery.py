# SPDX-License-Identifier: Apache-2.0
"""The tests that every fused operation has to pass, on every backend.

A test file derives a class from `Battery` and names its `Subject`; what is peculiar to an operation
(messages, formulas, limits) it tests itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from disca_kernels import dual, why_not
from disca_kernels.testing import assert_within_budget
from disca_kernels.testing.gradients import check_backward, check_jvp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_BACKENDS = ("eager", "triton", "cpu", "cuda")


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Attributes:
        op: name of the operation.
        function: the public function.
        pair: its value-and-tangent entry.
        reference: its specification, the public signature without backend.
        cases: of its cases.py, with odd sizes, in float32, bfloat16 and float16. The first one is
            small and float32; what transforms do to it is tested. Operands whose tangent is None
            are constants or absent.
        tolerance: of central differences in float64, relative to the largest element.
    """

    op: str
    function: Callable[..., Any]
    pair: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Sequence[Any]
    tolerance: float = 1e-5


def several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def runs(op: str, backend: str, *tensors: Tensor | None) -> pytest.MarkDecorator:
    reasons = why_not(op, backend, *tensors)
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def backends(op: str, *, kernels_only: bool = False) -> list[Any]:
    """Return the backends that an operation has, those marked that cannot run here."""
    probe = torch.empty(1, 1, 1, device=DEVICE)
    implemented = [b for b in _BACKENDS if "has no" not in "".join(why_not(op, b))]
    return [
        pytest.param(b, marks=runs(op, b, probe)) for b in implemented[1 if kernels_only else 0 :]
    ]


def _close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5)


class Bound:
    """A case of a subject on a backend, as functions of its differentiable operands alone."""

    def __init__(self, subject: Subject, case: Any, backend: str) -> None:
        self.subject, self.case, self.backend = subject, case, backend
        self.given = case.operands(device=DEVICE)
        self.moving = [i for i, t in enumerate(self.given.tangents) if t is not None]

    def full(self, leaves: Sequence[Tensor | None], rest: Sequence[Any]) -> tuple[Any, ...]:
        filled = list(rest)
        for i, leaf in zip(self.moving, leaves, strict=True):
            filled[i] = leaf
        return tuple(filled)

    def like(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """The constants as the leaves are: wide with wide ones, on the host with those there."""
        wide = leaves[0].dtype == torch.float64
        return tuple(
            x if x is None else x.to(leaves[0].device, torch.float64 if wide else x.dtype)
            for x in self.given.primals
        )

    @property
    def primals(self) -> tuple[Tensor, ...]:
        return tuple(self.given.primals[i] for i in self.moving)

    @property
    def tangents(self) -> tuple[Tensor, ...]:
        return tuple(self.given.tangents[i] for i in self.moving)

    def leaves(self) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in self.primals]

    def function(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        operands = self.full(leaves, self.given.primals)
        options = self.case.options
        return several(self.subject.function(*operands, **options, backend=self.backend))

    def reference(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        operands = self.full(leaves, self.like(leaves))
        return several(self.subject.reference(*operands, **self.case.options))

    def pair(
        self, leaves: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        primals = self.full(leaves, self.given.primals)
        dots = self.full(tangents, (None,) * len(primals))
        options = self.case.options
        outputs, out_dots = self.subject.pair(primals, dots, **options, backend=self.backend)
        return several(outputs), several(out_dots)

    def loss(self, *leaves: Tensor) -> Tensor:
        return sum((y * (1 + y)).sum() for y in self.function(*leaves))  # type: ignore[return-value]


def _joined(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *leaves: torch.cat([y.flatten() for y in function(*leaves)])


class Battery:
    """Derive from it and set `subject`."""

    subject: Subject

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names, subject = metafunc.fixturenames, self.subject
        if "case" in names:
            metafunc.parametrize("case", subject.cases, ids=str)
        if "backend" in names:
            metafunc.parametrize("backend", backends(subject.op))
        if "kernel" in names:
            metafunc.parametrize("kernel", backends(subject.op, kernels_only=True))

    def bound(self, backend: str, case: Any = None) -> Bound:
        return Bound(self.subject, case or self.subject.cases[0], backend)

    def test_forward(self, case: Any, backend: str) -> None:
        bound = self.bound(backend, case)
        outputs = bound.function(*bound.primals)
        exact = bound.reference(*(t.cpu().double() for t in bound.primals))
        yardstick = bound.reference(*bound.primals)
        for i, (y, *others) in enumerate(zip(outputs, exact, yardstick, strict=True)):
            assert y.is_contiguous()
            assert_within_budget(y, *others, name=f"{case} output {i}")

    def test_backward(self, case: Any, kernel: str) -> None:
        bound = self.bound(kernel, case)
        check_backward(
            _joined(bound.function),
            _joined(bound.reference),
            bound.primals,
            torch.cat([t.flatten() for t in bound.given.cotangents]),
            name=str(case),
            tolerance=self.subject.tolerance,
        )

    def test_jvp(self, case: Any, backend: str) -> None:
        self._check_pair(self.bound(backend, case), lambda i: False)

    def test_jvp_with_one_tangent_present_or_absent(self, backend: str) -> None:
        bound = self.bound(backend)
        for one in range(len(bound.moving)):
            self._check_pair(bound, lambda i, one=one: i != one)
            self._check_pair(bound, lambda i, one=one: i == one)

    def _check_pair(self, bound: Bound, absent: Callable[[int], bool]) -> None:
        tangents = [None if absent(i) else t for i, t in enumerate(bound.tangents)]
        for output in range(len(bound.given.cotangents)):

            def jvp(primals: Any, dots: Any, output: int = output) -> tuple[Tensor, Tensor]:
                outputs, out_dots = bound.pair(primals, dots)
                assert out_dots[output].is_contiguous()
                return outputs[output], out_dots[output]

            check_jvp(
                jvp,
                lambda *p, output=output: bound.reference(*p)[output],
                bound.primals,
                tangents,
                name=f"{bound.case} output {output}",
                tolerance=self.subject.tolerance,
            )

    def test_jvp_without_any_tangent(self, backend: str) -> None:
        bound = self.bound(backend)
        outputs, dots = bound.pair(bound.primals, [None] * len(bound.moving))
        for y, y_dot, alone in zip(outputs, dots, bound.function(*bound.primals), strict=True):
            assert torch.equal(y, alone)
            assert torch.equal(y_dot, torch.zeros_like(y))

    def test_func_jvp(self, backend: str) -> None:
        bound = self.bound(backend)
        expected = torch.func.jvp(bound.reference, bound.primals, bound.tangents)
        _close(torch.func.jvp(bound.function, bound.primals, bound.tangents), expected)

    def test_func_jvp_in_one_operand(self, backend: str) -> None:
        bound = self.bound(backend)
        for index in range(len(bound.moving)):

            def along(function: Any, index: int = index) -> Any:
                def of_one(t: Tensor) -> Any:
                    return function(*bound.primals[:index], t, *bound.primals[index + 1 :])

                return torch.func.jvp(of_one, bound.primals[index:][:1], bound.tangents[index:][:1])

            _close(along(bound.function), along(bound.reference))

    def test_dual_level(self, backend: str) -> None:
        bound = self.bound(backend)
        _, expected = torch.func.jvp(bound.reference, bound.primals, bound.tangents)
        with forward_ad.dual_level():
            pairs = zip(bound.primals, bound.tangents, strict=True)
            outputs = bound.function(*(forward_ad.make_dual(p, t) for p, t in pairs))
            dots = tuple(forward_ad.unpack_dual(y).tangent for y in outputs)
        _close(dots, expected)

    def test_dual_jvp_calls_the_pair(self, backend: str) -> None:
        bound = self.bound(backend)
        outputs, dots = dual.jvp(bound.function, bound.primals, bound.tangents)
        expected = bound.pair(bound.primals, bound.tangents)
        assert all(map(torch.equal, (*outputs, *dots), (*expected[0], *expected[1])))

    def test_value_is_tracked_and_tangent_is_detached(self, backend: str) -> None:
        bound = self.bound(backend)
        plain = bound.leaves()
        expected = torch.autograd.grad(bound.loss(*plain), plain)
        for jvp in (torch.func.jvp, dual.jvp, lambda _, p, t: bound.pair(p, t)):
            leaves = bound.leaves()
            outputs, dots = jvp(bound.function, tuple(leaves), bound.tangents)
            assert not any(dot.requires_grad for dot in dots)
            loss = sum((y * (1 + y)).sum() for y in outputs)
            _close(torch.autograd.grad(loss, leaves), expected)

    def test_gradient_through_the_tangent_is_zero(self, backend: str) -> None:
        bound = self.bound(backend)

        def tangent(x: Tensor) -> Tensor:
            def of_first(x: Tensor) -> Any:
                return bound.function(x, *bound.primals[1:])

            return sum(t.sum() for t in torch.func.jvp(of_first, (x,), (x.detach(),))[1])  # type: ignore[return-value]

        gradient = torch.func.grad(tangent)(bound.primals[0])
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_strided_operands(self, backend: str) -> None:
        bound = self.bound(backend)
        spread = [
            torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
            for t in (*bound.primals, *bound.tangents)
        ]
        half = len(spread) // 2
        actual = bound.pair(spread[:half], spread[half:])
        _close(actual, bound.pair(bound.primals, bound.tangents))
        leaves, plain = [t.detach().requires_grad_() for t in spread[:half]], bound.leaves()
        gradients = torch.autograd.grad(bound.loss(*leaves), leaves)
        _close(gradients, torch.autograd.grad(bound.loss(*plain), plain))

    def test_operands_that_are_only_marked_as_negated(self, kernel: str) -> None:
        bound = self.bound(kernel)
        negated = [torch._neg_view(-t) for t in (*bound.primals, *bound.tangents)]
        half = len(negated) // 2
        expected = bound.pair(bound.primals, bound.tangents)
        _close(bound.pair(negated[:half], negated[half:]), expected)
        _close(bound.function(*negated[:half]), expected[0])

    def test_expanded_gradient(self, kernel: str) -> None:
        bound = self.bound(kernel)

        def gradients(function: Any) -> Any:
            leaves = bound.leaves()
            return torch.autograd.grad(sum(y.sum() for y in function(*leaves)), leaves)

        _close(gradients(bound.function), gradients(bound.reference))

    def test_each_gradient_alone(self, kernel: str) -> None:
        bound = self.bound(kernel)
        leaves = bound.leaves()
        expected = torch.autograd.grad(bound.loss(*leaves), leaves)
        for index, whole in enumerate(expected):
            alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(bound.primals)]
            (gradient,) = torch.autograd.grad(bound.loss(*alone), alone[index])
            _close(gradient, whole)

    def test_an_output_that_is_not_used(self, kernel: str) -> None:
        bound = self.bound(kernel)
        for output in range(len(bound.given.cotangents)):

            def gradients(function: Any, output: int = output) -> Any:
                leaves = bound.leaves()
                loss = function(*leaves)[output].square().sum()
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                return [
                    torch.zeros_like(x) if g is None else g
                    for x, g in zip(leaves, found, strict=True)
                ]

            _close(gradients(bound.function), gradients(bound.reference))

    def test_vmap(self, backend: str) -> None:
        bound = self.bound(backend)
        stacks = [torch.stack((t, t + 0.25)) for t in bound.primals]

        def tangent(*leaves: Tensor) -> Any:
            return torch.func.jvp(bound.function, leaves, bound.tangents)[1]

        def gradient(*leaves: Tensor) -> Any:
            return torch.func.grad(bound.loss, argnums=tuple(range(len(leaves))))(*leaves)

        for function in (bound.function, tangent, gradient):
            for mapped in ({0}, set(range(len(stacks)))):
                in_dims = tuple(0 if i in mapped else None for i in range(len(stacks)))
                given = [s if i in mapped else s[0] for i, s in enumerate(stacks)]
                each = [
                    function(*(s[k if i in mapped else 0] for i, s in enumerate(stacks)))
                    for k in range(2)
                ]
                expected = tuple(torch.stack(pair) for pair in zip(*each, strict=True))
                _close(tuple(torch.vmap(function, in_dims)(*given)), expected)

    def test_second_derivatives(self, kernel: str) -> None:
        bound = self.bound(kernel)
        leaves = bound.leaves()
        first = torch.autograd.grad(bound.loss(*leaves), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
            sum(g.sum() for g in first).backward()  # type: ignore[union-attr]

        def tangent(*primals: Tensor) -> Any:
            return torch.func.jvp(bound.function, primals, bound.tangents)[1]

        with pytest.raises(NotImplementedError, match="jvp of jvp"):
            torch.func.jvp(tangent, bound.primals, bound.tangents)

    def test_pair_refuses_duals(self, backend: str) -> None:
        bound = self.bound(backend)
        with pytest.raises(NotImplementedError, match="carries a tangent of its own"):
            torch.func.jvp(lambda *p: bound.pair(p, bound.tangents), bound.primals, bound.tangents)

    @pytest.mark.filterwarnings("ignore")
    def test_compiles_whole(self, backend: str) -> None:
        if backend == "triton" and DEVICE == "cpu":
            pytest.skip("the interpreter is not what gets compiled")
        bound = self.bound(backend)
        torch.compiler.reset()

        def compiled(function: Any) -> Any:
            return torch.compile(function, backend="aot_eager", fullgraph=True)

        leaves, plain = bound.leaves(), bound.leaves()
        gradients = torch.autograd.grad(compiled(bound.loss)(*leaves), leaves)
        _close(gradients, torch.autograd.grad(bound.loss(*plain), plain))
        primals, tangents = bound.primals, bound.tangents
        _close(compiled(bound.pair)(primals, tangents), bound.pair(primals, tangents))

        def jvp(*primals: Tensor) -> Any:
            return torch.func.jvp(bound.function, primals, tangents)

        _close(compiled(jvp)(*primals), jvp(*primals))

    def test_same_bits_again_and_on_any_number_of_threads(self, kernel: str) -> None:
        bound = self.bound(kernel, self.subject.cases[-1])

        def results() -> list[Tensor]:
            leaves = bound.leaves()
            outputs, dots = bound.pair(leaves, bound.tangents)
            loss = sum((y.float() * (1 + y.float())).sum() for y in outputs)
            return [*outputs, *dots, *torch.autograd.grad(loss, leaves)]

        threads, first = torch.get_num_threads(), results()
        try:
            torch.set_num_threads(3)
            assert all(map(torch.equal, results(), first))
        finally:
            torch.set_num_threads(threads)

    def test_tensors_of_a_subclass_are_dispatched(self) -> None:
        seen = []

        class Spy(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                seen.append(func)
                return None

        bound = self.bound("auto")
        given = list(bound.given.primals)
        given[bound.moving[0]] = given[bound.moving[0]].as_subclass(Spy)
        self.subject.function(*given, **bound.case.options)
        assert seen == [self.subject.function]
