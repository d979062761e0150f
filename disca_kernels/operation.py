# SPDX-License-Identifier: Apache-2.0
"""Autograd in both modes for a fused operation, from its launchers.

A kernel runs inside a `torch.library` operator, which `torch.compile` and `torch.func` transforms
know how to call. Such an operator has no forward mode and loses a tangent without a word, so it is
called only by the rules of an autograd Function, and those refuse to pass a dual number on to it.
`FusedOperation` makes both from a description; an operation's `function.py` holds that description.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from disca_kernels import forward_mode
from disca_kernels.backend import Backend
from disca_kernels.operation_functions import dual_function, gradient_function, value_function
from disca_kernels.operation_library import KernelOperators, unwatched

__all__ = ["FusedOperation"]

Tensors = tuple[Tensor | None, ...]
Options = tuple[Any, ...]


class FusedOperation:
    """One operation: its `torch.library` operators and its autograd Functions.

    The launchers of every backend, in `disca_kernels.ops.<name>.<backend>`, are

        launch_fwd(operands, options, keep) -> results
        launch_bwd(cotangents, saved, needs, options) -> gradients, one per operand or None
        launch_jvp(primals, tangents, options, with_value, keep) -> (results or None, dots)

    Results are the outputs, then extras for the backward pass: an extra is an empty tensor unless
    `keep`. A cotangent is None if its output was not used, a tangent None if it is zero.

    Args:
        name: of the operation; the operators are `disca_kernels::<name>_fwd`, `_bwd`, `_dual` and
            `_tangent`.
        operands: names of the tensor arguments, optional ones last.
        options: the other arguments as a `torch.library` schema, such as "float eps, bool rms".
        outputs: how many tensors the operation returns.
        reference: the specification, `(*operands, *options) -> outputs`, plain PyTorch.
        jvp_reference: `(primals, tangents, *options) -> (outputs, dots)`, plain PyTorch.
        fake: `(operands, options, keep) -> results`, empty tensors of the right shapes.
        saved: what `launch_bwd` gets: names of operands, or "result0" and so on.
        like: for an operand that is not saved, the name of something saved of its shape and dtype.
        unbatched: operands whose first dimension is not the batch, such as weights.
        constant: operands without a derivative; a gradient or tangent of one is refused.
        passthrough: operands whose gradient is the cotangent of an output, by that output's number.
    """

    def __init__(
        self,
        name: str,
        *,
        operands: Sequence[str],
        reference: Callable[..., Any],
        jvp_reference: Callable[..., Any],
        fake: Callable[[Tensors, Options, bool], Sequence[Tensor]],
        options: str = "",
        outputs: int = 1,
        saved: Sequence[str] | None = None,
        like: Mapping[str, str] | None = None,
        unbatched: Sequence[str] = (),
        constant: Sequence[str] = (),
        passthrough: Mapping[str, int] | None = None,
    ) -> None:
        """Register the operators and make the Functions."""
        self.name, self.operands, self.outputs = name, tuple(operands), outputs
        self.reference, self.jvp_reference, self.fake = reference, jvp_reference, fake
        self.saved = tuple(operands if saved is None else saved)
        self.like = dict(like or {})
        self.unbatched, self.constant = frozenset(unbatched), frozenset(constant)
        self.passthrough = dict(passthrough or {})
        extras = {name for name in self.saved if name.startswith("result")}
        self.keeps = bool(extras - {f"result{i}" for i in range(outputs)})
        self._kernels = KernelOperators(self, options)
        title = "".join(part.capitalize() for part in name.split("_"))
        self._gradient_function = gradient_function(self, f"{title}GradientFunction")
        of_value = value_function(self, f"{title}Function")
        of_dual = dual_function(self, f"{title}DualFunction")

        def apply_value(*args: Any) -> tuple[Tensor, ...]:
            return tuple(of_value.apply(*args))  # type: ignore[no-untyped-call]

        def apply_dual(*args: Any) -> tuple[Tensor, ...]:
            return tuple(of_dual.apply(*args))  # type: ignore[no-untyped-call]

        self._apply_value, self._apply_dual = apply_value, apply_dual
        self._prepare_value = forward_mode.opaque_to_compile(apply_value)
        self._prepare_dual = forward_mode.opaque_to_compile(apply_dual)

    def value(self, operands: Tensors, options: Options, backend: Backend) -> tuple[Tensor, ...]:
        """Compute the outputs, differentiable in the modes that the backend offers."""
        self._refuse_tracked_constant(operands)
        if backend is Backend.EAGER and not forward_mode.active():
            return self.by_definition(operands, options)
        # Neither the Function nor the operator is needed where nobody would see it.
        if not _is_tracked(operands) and unwatched(operands):
            return tuple(self.run("fwd", [*operands], *options, False, backend.value))[
                : self.outputs
            ]
        self._prepare_value()
        keep = self._is_needed_later(operands)
        return self._apply_value(*operands, *options, keep, backend.value)[: self.outputs]

    def value_and_tangent(
        self, primals: Tensors, tangents: Tensors, options: Options, backend: Backend
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Compute (outputs, dots) in one pass; autograd tracks the outputs alone."""
        forward_mode.refuse_tangents(self._no_tangent_of_pair(), *primals, *tangents)
        self._refuse_constant(tangents)
        self._refuse_tracked_constant(primals)
        dots = tuple(None if x is None else x.detach() for x in tangents)
        if backend is Backend.EAGER:
            outputs = self.by_definition(primals, options)
            return outputs, self._eager_tangent(primals, dots, options)
        self._prepare_dual()
        keep = self._is_needed_later(primals)
        results = self._apply_dual(*primals, *dots, *options, keep, backend.value)
        return results[: self.outputs], tuple(x.detach() for x in results[-self.outputs :])

    def run(self, form: str, *args: Any) -> list[Tensor]:
        """Run the kernels of a form: "fwd", "bwd", "dual" or "tangent"."""
        return self._kernels.run(form, *args)

    def by_definition(self, operands: Tensors, options: Options) -> tuple[Tensor, ...]:
        """Compute the outputs by the reference."""
        return as_tuple(self.reference(*operands, *options))

    def _is_needed_later(self, operands: Tensors) -> bool:
        """Whether a backward pass may come that needs the extras."""
        if not (self.keeps and torch.is_grad_enabled()):
            return False
        return _is_tracked(operands) or torch._C._are_functorch_transforms_active()

    def launchers(self, backend: str) -> ModuleType:
        """Import the kernels that `backend` names; only now, since it may load a compiler."""
        return import_module(f"disca_kernels.ops.{self.name}.{backend}")

    def save(self, ctx: Any, operands: Tensors, results: Tensors, rest: Options) -> None:
        """Keep what the backward pass needs, for each backend, and the options."""
        *ctx.options, _, ctx.backend = rest
        ctx.set_materialize_grads(False)
        if ctx.backend == Backend.EAGER:
            ctx.save_for_backward(*operands)
            return
        known = dict(zip(self.operands, operands, strict=True))
        known |= {f"result{i}": result for i, result in enumerate(results)}
        ctx.save_for_backward(*(known[name] for name in self.saved))

    def gradient(self, ctx: Any, cotangents: Tensors) -> Tensors:
        """Compute the gradients that are needed, with the backend that computed the value."""
        needs = ctx.needs_input_grad[: len(self.operands)]
        cotangents = cotangents[: self.outputs]
        if all(x is None for x in cotangents):
            return (None,) * len(needs)
        if ctx.backend == Backend.EAGER:
            return self._eager_gradient(ctx, cotangents, needs)
        self._refuse_legacy_batches(cotangents)
        asked = [
            need and name not in self.passthrough and name not in self.constant
            for name, need in zip(self.operands, needs, strict=True)
        ]
        gradients: list[Tensor | None] = [None] * len(needs)
        if any(asked):
            # The Function only adds errors to the operator: it is needed where they could be due.
            differentiable = torch.is_grad_enabled() or forward_mode.active()
            run = self._gradient_function.apply if differentiable else self.plain_gradient
            results = run(*cotangents, *ctx.saved_tensors, *asked, *ctx.options, ctx.backend)
            gradients = [g if need else None for g, need in zip(results, asked, strict=True)]
        for name, output in self.passthrough.items():
            index = self.operands.index(name)
            if needs[index]:
                gradients[index] = cotangents[output]
        return tuple(gradients)

    def plain_gradient(self, *args: Any) -> tuple[Tensor, ...]:
        """Call the backward operator with cotangents, saved tensors, needs and options in a row."""
        first, second = self.outputs, self.outputs + len(self.saved)
        last = second + len(self.operands)
        lists = [*args[:first]], [*args[first:second]], [*args[second:last]]
        return tuple(self.run("bwd", *lists, *args[last:]))

    def _eager_gradient(self, ctx: Any, cotangents: Tensors, needs: Sequence[bool]) -> Tensors:
        """Differentiate the reference, so that the gradient has derivatives of its own."""
        operands, wanted = ctx.saved_tensors, [i for i, need in enumerate(needs) if need]

        def of(*leaves: Tensor) -> tuple[Tensor, ...]:
            given = list(operands)
            for i, leaf in zip(wanted, leaves, strict=True):
                given[i] = leaf
            return self.by_definition(tuple(given), tuple(ctx.options))

        outputs, pull_back, *_ = torch.func.vjp(of, *(operands[i] for i in wanted))
        filled = tuple(
            torch.zeros_like(y) if dy is None else dy
            for y, dy in zip(outputs, cotangents, strict=True)
        )
        gradients: list[Tensor | None] = [None] * len(needs)
        for i, gradient in zip(wanted, pull_back(filled), strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    def tangents_of(self, ctx: Any, tangents: Tensors) -> tuple[Tensor, ...]:
        """Compute the tangents of the outputs alone, from tangents of any dtype."""
        operands = ctx.saved_tensors
        forward_mode.refuse_second_tangent(self.name, *operands, *tangents)
        self._refuse_constant(tangents)
        with torch.no_grad():
            primals = tuple(None if x is None else x.detach() for x in operands)
            dots = tuple(
                None if t is None or x is None else t.detach().to(x.dtype)
                for x, t in zip(primals, tangents, strict=True)
            )
            if ctx.backend == Backend.EAGER:
                return self._eager_tangent(primals, dots, tuple(ctx.options))
            found = self.run("tangent", [*primals], [*dots], *ctx.options, ctx.backend)
            return tuple(x.detach() for x in found)

    def _eager_tangent(
        self, primals: Tensors, tangents: Tensors, options: Options
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            dots = self.jvp_reference(primals, tangents, *options)[1]
            return tuple(x.detach().contiguous() for x in as_tuple(dots))

    def _refuse_constant(self, tangents: Tensors) -> None:
        for name, tangent in zip(self.operands, tangents, strict=True):
            if tangent is not None and name in self.constant:
                raise NotImplementedError(
                    f"{self.name}: {name} is a constant and cannot have a tangent; "
                    f"{self.name}_reference is differentiable in it"
                )

    def _refuse_tracked_constant(self, operands: Tensors) -> None:
        if not (self.constant and _is_tracked(operands)):
            return
        for name, operand in zip(self.operands, operands, strict=True):
            if name in self.constant and operand is not None and operand.requires_grad:
                raise NotImplementedError(
                    f"{self.name}: {name} is a constant and cannot have a gradient; pass "
                    f"{name}.detach(), or use {self.name}_reference, which is differentiable in it"
                )

    def _refuse_legacy_batches(self, cotangents: Tensors) -> None:
        if any(x is not None and is_legacy_batchedtensor(x) for x in cotangents):
            raise NotImplementedError(
                f"{self.name}: is_grads_batched=True and vectorize=True go through PyTorch's old "
                "vmap, which no kernel can follow. Use torch.func.jacrev or torch.vmap over "
                "torch.func.vjp, or backend='eager'"
            )

    def _no_tangent_of_pair(self) -> str:
        return (
            f"{self.name}_jvp: an operand carries a tangent of its own (torch.func.jvp or "
            "forward_ad.dual_level is active), which would silently be lost. Inside forward mode "
            f"call {self.name}; its tangent comes by itself"
        )


def _is_tracked(operands: Tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return one output, or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
