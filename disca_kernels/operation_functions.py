# SPDX-License-Identifier: Apache-2.0
"""The autograd Functions of a `FusedOperation`: value, value with tangent, and gradient.

`forward` takes tensors and options in one flat list, because PyTorch looks for tensors nowhere
else: operands[, tangents], options, keep, backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.batching import fold_named, in_a_loop, unfold

if TYPE_CHECKING:
    from disca_kernels.operation import FusedOperation

Function = type[torch.autograd.Function]


def value_function(operation: FusedOperation, name: str) -> Function:
    """Return the Function of an operation's value.

    Its tangent is detached: it is computed without a graph, from tensors without one.
    """
    count = len(operation.operands)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        operands, (*options, keep, backend) = args[:count], args[count:]
        if backend == Backend.EAGER:
            return operation.by_definition(operands, tuple(options))
        return tuple(operation.run("fwd", [*operands], *options, keep, backend))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operands = inputs[:count]
        ctx.mark_non_differentiable(*output[operation.outputs :])
        ctx.save_for_forward(*operands)
        ctx.n_inputs, ctx.n_extras = len(inputs), len(output) - operation.outputs
        operation.save(ctx, operands, output, inputs[count:])

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = operation.gradient(ctx, cotangents)
        return (*gradients, *(None,) * (ctx.n_inputs - count))

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dots = operation.tangents_of(ctx, tangents[:count])
        return (*dots, *(None,) * ctx.n_extras)

    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, operands, rest = info.batch_size, args[:count], args[count:]
        dims = in_dims[:count]
        folded = fold_named(size, dims, operands, operation.operands, operation.unbatched)
        if folded is None:
            results = in_a_loop(size, [dims], [operands], lambda x: apply(*x, *rest), ())
        else:
            results = [unfold(size, r) for r in apply(*folded, *rest)]
        return tuple(results), (0,) * len(results)

    made = _function(name, forward, setup_context, backward, jvp=jvp, vmap=vmap)
    apply: Any = made.apply
    return made


def dual_function(operation: FusedOperation, name: str) -> Function:
    """Return the Function of value and tangent together: reverse mode through the value alone."""
    count = len(operation.operands)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        primals, tangents, rest = args[:count], args[count : 2 * count], args[2 * count :]
        return tuple(operation.run("dual", [*primals], [*tangents], *rest))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[operation.outputs :])
        ctx.n_inputs = len(inputs)
        operation.save(ctx, inputs[:count], output[: -operation.outputs], inputs[2 * count :])

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = operation.gradient(ctx, cotangents)
        return (*gradients, *(None,) * (ctx.n_inputs - count))

    return _function(name, forward, setup_context, backward, generate_vmap_rule=True)


def gradient_function(operation: FusedOperation, name: str) -> Function:
    """Return the backward kernel with an error where PyTorch would ask for second derivatives."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return operation.plain_gradient(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing: there is no second derivative."""

    def refuse(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(
            f"{operation.name}: the gradient that a kernel computes cannot be differentiated "
            "again, in either mode. backend='eager' can do that"
        )

    return _function(name, forward, setup_context, refuse, jvp=refuse, generate_vmap_rule=True)


def _function(
    name: str, forward: Any, setup_context: Any, backward: Any, **others: Any
) -> Function:
    """Make a Function from its rules."""
    rules = {"forward": forward, "setup_context": setup_context, "backward": backward, **others}
    members = {key: staticmethod(rule) if callable(rule) else rule for key, rule in rules.items()}
    return type(name, (torch.autograd.Function,), members)
