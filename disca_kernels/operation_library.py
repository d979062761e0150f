# SPDX-License-Identifier: Apache-2.0
"""The `torch.library` operators of a `FusedOperation`: bodies, shapes for tracing, vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from disca_kernels import forward_mode
from disca_kernels.batching import fold_named, in_a_loop, unfold
from disca_kernels.operands import resolved

if TYPE_CHECKING:
    from disca_kernels.operation import FusedOperation

_PLAIN = (Tensor, torch.nn.Parameter)


class KernelOperators:
    """The four operators of an operation; they call the launchers of a backend.

    Args:
        operation: what they belong to.
        options: the arguments that are no tensors, as a schema.
    """

    def __init__(self, operation: FusedOperation, options: str) -> None:
        """Register the operators."""
        self.operation = operation
        between = f", {options}" if options else ""
        forms: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
            "fwd": (f"Tensor?[] operands{between}, bool keep", self._fwd, self._fake_fwd),
            "bwd": (
                f"Tensor?[] cotangents, Tensor?[] saved, bool[] needs{between}",
                self._bwd,
                self._fake_bwd,
            ),
            "dual": (
                f"Tensor?[] primals, Tensor?[] tangents{between}, bool keep",
                self._dual,
                self._fake_dual,
            ),
            "tangent": (
                f"Tensor?[] primals, Tensor?[] tangents{between}",
                self._tangent,
                self._fake_tangent,
            ),
        }
        self.operators: dict[str, Callable[..., Any]] = {}
        self._bodies = {form: run for form, (_, run, _) in forms.items()}
        for form, (arguments, run, fake) in forms.items():
            operator = torch.library.custom_op(
                f"disca_kernels::{operation.name}_{form}",
                run,
                mutates_args=(),
                schema=f"({arguments}, str backend) -> Tensor[]",
            )
            operator.register_fake(fake)
            operator.register_vmap(self._vmap_rule(form, operator))
            self.operators[form] = operator

    def run(self, form: str, *args: Any) -> list[Tensor]:
        """Run the operator of a form, or its body where nothing would see the difference.

        Calling an operator that is written in Python costs as much as a small kernel.
        """
        given = [x for argument in args if type(argument) is list for x in argument]
        call = self._bodies[form] if unwatched(given) else self.operators[form]
        results: list[Tensor] = call(*args)
        return results

    def _fwd(self, operands: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *options, keep, backend = rest
        launch = self.operation.launchers(backend).launch_fwd
        return [*launch(resolved(operands), tuple(options), keep)]

    def _bwd(
        self,
        cotangents: list[Tensor | None],
        saved: list[Tensor | None],
        needs: list[bool],
        *rest: Any,
    ) -> list[Tensor]:
        *options, backend = rest
        gradients = self.operation.launchers(backend).launch_bwd(
            resolved(cotangents), resolved(saved), tuple(needs), tuple(options)
        )
        # An operator cannot return None; an empty tensor stands for what was not asked for.
        some = next(x for x in cotangents if x is not None)
        return [some.new_empty(0) if g is None else g for g in gradients]

    def _dual(
        self, primals: list[Tensor | None], tangents: list[Tensor | None], *rest: Any
    ) -> list[Tensor]:
        *options, keep, backend = rest
        results, dots = self.operation.launchers(backend).launch_jvp(
            resolved(primals), resolved(tangents), tuple(options), True, keep
        )
        return [*results, *dots]

    def _tangent(
        self, primals: list[Tensor | None], tangents: list[Tensor | None], *rest: Any
    ) -> list[Tensor]:
        *options, backend = rest
        _, dots = self.operation.launchers(backend).launch_jvp(
            resolved(primals), resolved(tangents), tuple(options), False, False
        )
        return [*dots]

    def _fake_fwd(self, operands: list[Tensor | None], *rest: Any) -> list[Tensor]:
        *options, keep, _ = rest
        return [*self.operation.fake(tuple(operands), tuple(options), keep)]

    def _fake_bwd(
        self,
        cotangents: list[Tensor | None],
        saved: list[Tensor | None],
        needs: list[bool],
        *_: Any,
    ) -> list[Tensor]:
        known = dict(zip(self.operation.saved, saved, strict=True))
        some = next(x for x in cotangents if x is not None)
        gradients = []
        for name, need in zip(self.operation.operands, needs, strict=True):
            model = known.get(self.operation.like.get(name, name)) if need else None
            gradients.append(
                some.new_empty(0)
                if model is None
                else torch.empty(model.shape, dtype=model.dtype, device=model.device)
            )
        return gradients

    def _fake_dual(
        self, primals: list[Tensor | None], tangents: list[Tensor | None], *rest: Any
    ) -> list[Tensor]:
        *options, keep, _ = rest
        results = [*self.operation.fake(tuple(primals), tuple(options), keep)]
        return results + [torch.empty_like(x) for x in results[: self.operation.outputs]]

    def _fake_tangent(
        self, primals: list[Tensor | None], tangents: list[Tensor | None], *rest: Any
    ) -> list[Tensor]:
        *options, _ = rest
        return [*self.operation.fake(tuple(primals), tuple(options), False)][
            : self.operation.outputs
        ]

    def _vmap_rule(self, form: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        """Fold the mapped dimension into the batch; where a weight is mapped, loop instead."""
        lists = 2 if form != "fwd" else 1

        def names(args: tuple[Any, ...]) -> list[list[str]]:
            if form == "bwd":
                return [[""] * len(args[0]), list(self.operation.saved)]
            return [list(self.operation.operands)] * lists

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            rest = args[lists:]
            dims = [
                [None] * len(given) if dim is None else list(dim)
                for given, dim in zip(args[:lists], in_dims, strict=False)
            ]
            summed = form == "bwd" and any(
                need and name in self.operation.unbatched
                for name, need in zip(self.operation.operands, rest[0], strict=True)
            )
            folded = [
                fold_named(info.batch_size, d, given, which, self.operation.unbatched)
                for d, given, which in zip(dims, args[:lists], names(args), strict=True)
            ]
            if summed or any(f is None for f in folded):
                results = in_a_loop(info.batch_size, dims, args[:lists], operator, rest)
            else:
                results = [unfold(info.batch_size, r) for r in operator(*folded, *rest)]
            return results, [0] * len(results)

        return rule


def unwatched(operands: Sequence[Any]) -> bool:
    """Whether these are plain tensors, and nothing transforms, traces or counts calls."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if forward_mode.active() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(
        not isinstance(x, Tensor) or (type(x) in _PLAIN and not is_legacy_batchedtensor(x))
        for x in operands
    )
