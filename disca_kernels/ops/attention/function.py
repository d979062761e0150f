# SPDX-License-Identifier: Apache-2.0
"""Autograd of attention: operators that run kernels, and the Functions above them.

A kernel runs inside a `torch.library` operator, which `torch.compile` and `torch.func` transforms
know how to call. Such an operator has no forward mode and loses a tangent without a word, so it
is called only by the rules of a Function, and those refuse a tangent that it would lose.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from disca_kernels import forward_mode
from disca_kernels.backend import Backend
from disca_kernels.batching import fold, folding_rule, unfold
from disca_kernels.ops.attention import eager

_NO_SECOND_DERIVATIVE = (
    "attention: the gradient that a kernel computes cannot be differentiated again, in either mode "
    "(which includes a backward pass inside forward_ad.dual_level). backend='eager' can do that"
)
_NO_TANGENT_OF_PAIR = (
    "attention_jvp: an operand carries a tangent of its own (torch.func.jvp or "
    "forward_ad.dual_level is active), which would silently be lost. Inside forward mode call "
    "attention; its tangent comes by itself"
)

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launchers(backend: str) -> ModuleType:
    """Import the module whose kernels `backend` names; only now, since it may load a compiler."""
    return import_module(f"disca_kernels.ops.attention.{backend}")


@torch.library.custom_op("disca_kernels::attention_fwd", mutates_args=())
def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o, lse = _launchers(backend).launch_fwd(q, k, v, kv_lengths, causal, scale)
    return o, lse


@torch.library.custom_op("disca_kernels::attention_bwd", mutates_args=())
def _bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = _launchers(backend).launch_bwd
    dq, dk, dv = launch(do, (q, k, v), o, lse, kv_lengths, causal, scale)
    return dq, dk, dv


@torch.library.custom_op("disca_kernels::attention_dual", mutates_args=())
def _dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = _launchers(backend).launch_jvp
    o, lse, o_dot = launch((q, k, v), (q_dot, k_dot, v_dot), kv_lengths, causal, scale)
    return o, lse, o_dot


@torch.library.custom_op("disca_kernels::attention_tangent", mutates_args=())
def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    launch = _launchers(backend).launch_tangent
    o_dot: Tensor = launch((q, k, v), (q_dot, k_dot, v_dot), lse, kv_lengths, causal, scale)
    return o_dot


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _lse_of(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _lse_of(q)


@_bwd.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


@_dual.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _lse_of(q), _like(q)


@_tangent.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _like(q)


for _operator in (_fwd, _bwd, _dual, _tangent):
    _operator.register_vmap(folding_rule(_operator))


class AttentionGradientFunction(torch.autograd.Function):
    """The backward kernels, with an error where PyTorch would ask for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        kv_lengths: Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv."""
        dq, dk, dv = _bwd(do, q, k, v, o, lse, kv_lengths, causal, scale, backend)
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


def _gradient(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute the gradients with the backend that computed the value."""
    if do is None:
        return None, None, None
    q, k, v, o, lse, kv_lengths = ctx.saved_tensors
    if ctx.backend == Backend.EAGER:
        return eager.gradient(do, (q, k, v), kv_lengths, ctx.causal, ctx.scale)
    gradients: tuple[Tensor, ...] = AttentionGradientFunction.apply(  # type: ignore[no-untyped-call]
        do, q, k, v, o, lse, kv_lengths, ctx.causal, ctx.scale, ctx.backend
    )
    return gradients


class AttentionFunction(torch.autograd.Function):
    """Autograd of `attention` in both modes; returns o and the log-sum-exp of the scores.

    The tangent is detached: it is computed without a graph, from tensors without one.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lengths: Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Compute the value; PyTorch passes plain tensors without their tangents."""
        if backend == Backend.EAGER:
            # Its rules compute P again and need no log-sum-exp.
            return eager.forward(q, k, v, kv_lengths, causal, scale), _lse_of(q[:, :, :0])
        o, lse = _fwd(q, k, v, kv_lengths, causal, scale, backend)
        return o, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the same tensors for both modes."""
        q, k, v, kv_lengths, ctx.causal, ctx.scale, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, kv_lengths)
        ctx.save_for_forward(q, k, v, *output, kv_lengths)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        return (*_gradient(ctx, do), None, None, None, None)

    @staticmethod
    def jvp(
        ctx: Any, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, *_: None
    ) -> tuple[Tensor, None]:
        """Compute the tangent alone; an absent tangent arrives as None and costs nothing."""
        q, k, v, _, lse, kv_lengths = ctx.saved_tensors
        forward_mode.refuse_second_tangent("attention", q, k, v, q_dot, k_dot, v_dot)
        with torch.no_grad():
            primals = q.detach(), k.detach(), v.detach()
            dots = _cast((q_dot, k_dot, v_dot), q.dtype)
            if ctx.backend == Backend.EAGER:
                o_dot = eager.tangent(primals, dots, kv_lengths, ctx.causal, ctx.scale)
            else:
                o_dot = _tangent(
                    *primals, lse.detach(), *dots, kv_lengths, ctx.causal, ctx.scale, ctx.backend
                )
            return o_dot.detach(), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        """Fold the mapped dimension into the batch."""
        folded = fold(info.batch_size, in_dims, args)
        o, lse = AttentionFunction.apply(*folded)  # type: ignore[no-untyped-call]
        return (unfold(info.batch_size, o), unfold(info.batch_size, lse)), (0, 0)


class AttentionDualFunction(torch.autograd.Function):
    """Autograd of `attention_jvp`: reverse mode through the value alone."""

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
        causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute value, log-sum-exp and tangent in one pass."""
        o, lse, o_dot = _dual(q, k, v, q_dot, k_dot, v_dot, kv_lengths, causal, scale, backend)
        return o, lse, o_dot

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Save what the gradient of the value needs; the tangent has none."""
        q, k, v, _, _, _, kv_lengths, ctx.causal, ctx.scale, ctx.backend = inputs
        o, lse, o_dot = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, o_dot)
        ctx.save_for_backward(q, k, v, o, lse, kv_lengths)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        return (*_gradient(ctx, do), None, None, None, None, None, None, None)

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
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    o: Tensor = AttentionFunction.apply(q, k, v, kv_lengths, causal, scale, backend)[0]  # type: ignore[no-untyped-call]
    return o


def _apply_dual_function(
    primals: Primals,
    tangents: Tangents,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o, _, o_dot = AttentionDualFunction.apply(  # type: ignore[no-untyped-call]
        *primals, *tangents, kv_lengths, causal, scale, backend
    )
    return o, o_dot.detach()


_prepare_compile = forward_mode.opaque_to_compile(_apply_function)
_prepare_compile_dual = forward_mode.opaque_to_compile(_apply_dual_function)


def value(
    primals: Primals, kv_lengths: Tensor | None, causal: bool, scale: float, backend: Backend
) -> Tensor:
    """Compute o, differentiable in the modes that the backend offers."""
    if backend is Backend.EAGER and not forward_mode.active():
        return eager.forward(*primals, kv_lengths, causal, scale)
    _prepare_compile()
    return _apply_function(*primals, kv_lengths, causal, scale, backend.value)


def value_and_tangent(
    primals: Primals,
    tangents: Tangents,
    kv_lengths: Tensor | None,
    causal: bool,
    scale: float,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Compute (o, o_dot) in one pass; autograd tracks o alone."""
    if backend is Backend.EAGER:
        return eager.value_and_tangent(primals, tangents, kv_lengths, causal, scale)
    _prepare_compile_dual()
    return _apply_dual_function(primals, tangents, kv_lengths, causal, scale, backend.value)
