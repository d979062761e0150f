# SPDX-License-Identifier: Apache-2.0
"""Autograd of attention: the Functions above the operators, and what the public calls run."""

from typing import Any

import torch
from torch import Tensor

from disca_kernels import forward_mode
from disca_kernels.backend import Backend
from disca_kernels.batching import fold, unfold
from disca_kernels.ops.attention import eager, operators
from disca_kernels.ops.attention.eager import Options, Primals, Tangents

_NO_SECOND_DERIVATIVE = (
    "attention: the gradient that a kernel computes cannot be differentiated again, in either mode "
    "(which includes a backward pass inside forward_ad.dual_level). attention_reference can do that"
)
_NO_TANGENT_OF_PAIR = (
    "attention_jvp: an operand carries a tangent of its own (torch.func.jvp or "
    "forward_ad.dual_level is active), which would silently be lost. Inside forward mode call "
    "attention; its tangent comes by itself"
)
_NO_TANGENT_OF_TANGENT = (
    "attention_tangent: an operand carries a tangent of its own (torch.func.jvp or "
    "forward_ad.dual_level is active), which would silently be lost. Inside forward mode call "
    "attention; its primal option chooses what computes the value"
)


class AttentionGradientFunction(torch.autograd.Function):
    """The backward kernels, with an error where PyTorch would ask for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        kv_lengths: Tensor | None,
        block: int,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv."""
        dq, dk, dv = operators.bwd(
            do, dlse, q, k, v, o, lse, kv_lengths, block, scale, backend
        )  # fmt: skip
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute the gradients with the backend that computed the value."""
    if do is None and dlse is None:
        return None, None, None
    q, k, v, o, lse, kv_lengths = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    options = Options(kv_lengths, ctx.block, ctx.scale)
    if ctx.backend == Backend.EAGER:
        return eager.gradient(do, dlse, (q, k, v), options)
    gradients: tuple[Tensor, ...] = AttentionGradientFunction.apply(  # type: ignore[no-untyped-call]
        do, dlse, q, k, v, o, lse, *options, ctx.backend
    )
    return gradients


class AttentionFunction(torch.autograd.Function):
    """Autograd of `attention` in both modes: o, lse, and what o lost to rounding.

    The tangent is detached: it is computed without a graph, from tensors without one. Without
    `with_lse` the eager backend, which needs none, leaves lse empty.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lengths: Tensor | None,
        block: int,
        scale: float,
        with_lse: bool,
        wide: bool,
        source: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the value; PyTorch passes plain tensors without their tangents."""
        if backend == Backend.EAGER:
            options, nothing = Options(kv_lengths, block, scale), q.new_empty((*q.shape[:3], 0))
            if with_lse:
                return *eager.forward_with_lse(q, k, v, options), nothing
            return eager.forward(q, k, v, options), operators.lse_like(q[:, :, :0]), nothing
        o, lse, rest = operators.fwd(q, k, v, kv_lengths, block, scale, wide, source, backend)
        return o, lse, rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the same tensors for both modes."""
        q, k, v, kv_lengths, ctx.block, ctx.scale, ctx.with_lse, _, _, ctx.backend = inputs
        o, lse, rest = output
        ctx.set_materialize_grads(False)
        absent = ctx.backend == Backend.EAGER and not ctx.with_lse
        ctx.mark_non_differentiable(rest, *(lse,) * absent)
        ctx.save_for_backward(q, k, v, o, lse, kv_lengths)
        ctx.save_for_forward(q, k, v, o, rest, lse, kv_lengths)

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        return (*_gradient(ctx, do, dlse), *(None,) * 7)

    @staticmethod
    def jvp(
        ctx: Any, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Compute the tangents alone; an absent tangent arrives as None and costs nothing."""
        q, k, v, o, rest, lse, kv_lengths = ctx.saved_tensors
        forward_mode.refuse_second_tangent("attention", q, k, v, q_dot, k_dot, v_dot)
        with torch.no_grad():
            dots = _cast((q_dot, k_dot, v_dot), q.dtype)
            primals = q.detach(), k.detach(), v.detach()
            options = Options(kv_lengths, ctx.block, ctx.scale)
            if ctx.backend == Backend.EAGER:
                o_dot, lse_dot = eager.tangent(primals, dots, options)
                return o_dot.detach(), lse_dot.detach() if ctx.with_lse else None, None
            known = [o.detach(), lse.detach(), rest.detach()]
            o_dot, lse_dot = operators.tangent(*primals, *dots, known, *options, ctx.backend)
            return o_dot.detach(), lse_dot.detach(), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch."""
        folded = fold(info.batch_size, in_dims, args)
        results = AttentionFunction.apply(*folded)  # type: ignore[no-untyped-call]
        return tuple(unfold(info.batch_size, x) for x in results), (0, 0, 0)


class AttentionDualFunction(torch.autograd.Function):
    """Autograd of `attention_jvp`: reverse mode through the values alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        kv_lengths: Tensor | None,
        block: int,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """Compute the values and their tangents in one pass."""
        o, lse, o_dot, lse_dot = operators.dual(
            q, k, v, q_dot, k_dot, v_dot, kv_lengths, block, scale, backend
        )
        return o, lse, o_dot, lse_dot

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the gradient of the values needs; the tangents have none."""
        q, k, v, _, _, _, kv_lengths, ctx.block, ctx.scale, ctx.backend = inputs
        o, lse, o_dot, lse_dot = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(o_dot, lse_dot)
        ctx.save_for_backward(q, k, v, o, lse, kv_lengths)

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        return (*_gradient(ctx, do, dlse), *(None,) * 7)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor, ...]:
        """Refuse: an operand has a tangent of forward-mode AD beside the one that was passed."""
        raise NotImplementedError(_NO_TANGENT_OF_PAIR)


def _cast(tangents: Tangents, dtype: torch.dtype) -> Tangents:
    """Give tangents, which PyTorch allows to have another dtype, that of their primals."""
    q_dot, k_dot, v_dot = (None if x is None else x.detach().to(dtype) for x in tangents)
    return q_dot, k_dot, v_dot


def _apply_function(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    with_lse: bool,
    wide: bool,
    source: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o, lse, _ = AttentionFunction.apply(  # type: ignore[no-untyped-call]
        q, k, v, kv_lengths, block, scale, with_lse, wide, source, backend
    )
    return o, lse


def _apply_dual_function(
    primals: Primals,
    tangents: Tangents,
    kv_lengths: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse, o_dot, lse_dot = AttentionDualFunction.apply(  # type: ignore[no-untyped-call]
        *primals, *tangents, kv_lengths, block, scale, backend
    )
    return o, lse, o_dot.detach(), lse_dot.detach()


_prepare_compile = forward_mode.opaque_to_compile(_apply_function)
_prepare_compile_dual = forward_mode.opaque_to_compile(_apply_dual_function)


def value(
    primals: Primals, options: Options, with_lse: bool, source: str, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """Compute o, and lse if wanted, differentiable in the modes that the backend offers."""
    forward = forward_mode.active()
    if backend is Backend.EAGER and not forward:
        if with_lse:
            return eager.forward_with_lse(*primals, options)
        return eager.forward(*primals, options), None
    _prepare_compile()
    return _apply_function(*primals, *options, with_lse, forward, source, backend.value)


def value_and_tangent(
    primals: Primals, tangents: Tangents, options: Options, with_lse: bool, backend: Backend
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute (o, lse, o_dot, lse_dot) in one pass; autograd tracks o and lse alone."""
    if backend is Backend.EAGER:
        present = [x for x in tangents if x is not None]
        forward_mode.refuse_tangents(_NO_TANGENT_OF_PAIR, *primals, *present)
        return eager.value_and_tangent(primals, tangents, options, with_lse)
    _prepare_compile_dual()
    return _apply_dual_function(primals, tangents, *options, backend.value)


def tangent(
    primals: Primals,
    tangents: Tangents,
    o: Tensor,
    lse: Tensor,
    options: Options,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Compute (o_dot, lse_dot) beneath which any attention computed o and lse; no gradients."""
    present = [x for x in tangents if x is not None]
    forward_mode.refuse_tangents(_NO_TANGENT_OF_TANGENT, *primals, *present, o, lse)
    with torch.no_grad():
        q, k, v, o, lse = (x.detach() for x in (*primals, o, lse))
        dots = _cast(tangents, q.dtype)
        if backend is Backend.EAGER:
            o_dot, lse_dot = eager.tangent((q, k, v), dots, options)
        else:
            o_dot, lse_dot = operators.tangent(q, k, v, *dots, [o, lse], *options, backend.value)
        return o_dot.detach(), lse_dot.detach()
