# SPDX-License-Identifier: Apache-2.0
"""Autograd of adaptive layer-norm modulation: operators that run kernels, Functions above them.

A kernel runs inside a `torch.library` operator, which `torch.compile` and `torch.func` transforms
know how to call. Such an operator has no forward mode and loses a tangent without a word, so it
is called only by the rules of a Function, and those refuse to pass a dual number on to it.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from disca_kernels import forward_mode
from disca_kernels.backend import Backend
from disca_kernels.batching import fold, folding_rule, unfold
from disca_kernels.ops.adaln_modulate.reference import (
    adaln_modulate_jvp_reference,
    adaln_modulate_reference,
    adaln_modulate_vjp_reference,
    compute_dtype,
    tangent_of_normalised,
)

_NO_TANGENT_OF_PAIR = (
    "adaln_modulate_jvp: an operand carries a tangent of its own (torch.func.jvp or "
    "forward_ad.dual_level is active), which would silently be lost. Inside forward mode call "
    "adaln_modulate; its tangent comes by itself"
)

_NO_SECOND_DERIVATIVE = (
    "adaln_modulate: the gradient that a kernel computes cannot be differentiated again, in either "
    "mode. backend='eager' can do that"
)

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launchers(backend: str) -> ModuleType:
    """Import the module whose kernels `backend` names; only now, since it may load a compiler."""
    return import_module(f"disca_kernels.ops.adaln_modulate.{backend}")


@torch.library.custom_op("disca_kernels::adaln_modulate_fwd", mutates_args=())
def _fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
    y: Tensor = _launchers(backend).launch_fwd(x, shift, scale, eps)
    return y


@torch.library.custom_op("disca_kernels::adaln_modulate_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    eps: float,
    backend: str,
    needs_x: bool,
    needs_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _launchers(backend).launch_bwd(dy, x, scale, eps, needs_x, needs_modulation)
    # An operator cannot return None; an empty tensor stands for what was not asked for.
    dx, dshift, dscale = (x.new_empty(0) if g is None else g for g in gradients)
    return dx, dshift, dscale


@torch.library.custom_op("disca_kernels::adaln_modulate_dual", mutates_args=())
def _dual(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tangents = (x_dot, shift_dot, scale_dot)
    y, y_dot = _launchers(backend).launch_jvp((x, shift, scale), tangents, eps, with_value=True)
    return y, y_dot


@torch.library.custom_op("disca_kernels::adaln_modulate_tangent", mutates_args=())
def _tangent(
    x: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    primals, tangents = (x, scale, scale), (x_dot, shift_dot, scale_dot)
    _, y_dot = _launchers(backend).launch_jvp(primals, tangents, eps, with_value=False)
    result: Tensor = y_dot
    return result


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_fwd.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
    return _like(x)


@_bwd.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    eps: float,
    backend: str,
    needs_x: bool,
    needs_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _like(x) if needs_x else x.new_empty(0)
    dshift, dscale = (_like(scale) if needs_modulation else x.new_empty(0) for _ in range(2))
    return dx, dshift, dscale


@_dual.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


@_tangent.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


for _operator in (_fwd, _bwd, _dual, _tangent):
    _operator.register_vmap(folding_rule(_operator))


class AdalnModulateGradientFunction(torch.autograd.Function):
    """The backward kernel, with an error where PyTorch would ask for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        scale: Tensor,
        eps: float,
        backend: str,
        needs_x: bool,
        needs_modulation: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dx, dshift and dscale; an empty tensor stands for what is not needed."""
        dx, dshift, dscale = _bwd(dy, x, scale, eps, backend, needs_x, needs_modulation)
        return dx, dshift, dscale

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


def _gradient(ctx: Any, dy: Tensor | None) -> Triple:
    """Compute the gradients that are needed, with the backend that computed the value."""
    if dy is None:
        return None, None, None
    x, scale = ctx.saved_tensors
    needs_x, needs_shift, needs_scale = ctx.needs_input_grad[:3]
    if ctx.backend == Backend.EAGER:
        dx, dshift, dscale = adaln_modulate_vjp_reference(dy, x, scale, eps=ctx.eps)
    else:
        # The Function only adds errors to the operator: it is needed where they could be due.
        differentiable = torch.is_grad_enabled() or forward_mode.active()
        backward = AdalnModulateGradientFunction.apply if differentiable else _bwd
        dx, dshift, dscale = backward(  # type: ignore[no-untyped-call]
            dy, x, scale, ctx.eps, ctx.backend, needs_x, needs_shift or needs_scale
        )
    return dx if needs_x else None, dshift if needs_shift else None, dscale if needs_scale else None


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keep x, scale and the options; the value is linear in shift, which no rule needs."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[2])
    *_, ctx.eps, ctx.backend = inputs


class AdalnModulateFunction(torch.autograd.Function):
    """Autograd of `adaln_modulate` in both modes.

    The tangent is detached: it is computed without a graph, from tensors without one.
    """

    @staticmethod
    def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
        """Compute the value; PyTorch passes plain tensors without their tangents."""
        if backend == Backend.EAGER:
            return adaln_modulate_reference(x, shift, scale, eps=eps)
        y: Tensor = _fwd(x, shift, scale, eps, backend)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the same tensors for both modes."""
        _save(ctx, inputs)
        ctx.save_for_forward(inputs[0], inputs[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed."""
        return (*_gradient(ctx, dy), None, None)

    @staticmethod
    def jvp(
        ctx: Any,
        x_dot: Tensor | None,
        shift_dot: Tensor | None,
        scale_dot: Tensor | None,
        *_: None,
    ) -> Tensor:
        """Compute the tangent alone; an absent tangent arrives as None and costs nothing."""
        x, scale = ctx.saved_tensors
        tangents = (x_dot, shift_dot, scale_dot)
        forward_mode.refuse_second_tangent("adaln_modulate", x, scale, *tangents)
        with torch.no_grad():
            return _tangent_of(x, scale, tangents, ctx.eps, ctx.backend).detach()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Fold the mapped dimension into the batch."""
        folded = fold(info.batch_size, in_dims, args)
        y: Tensor = AdalnModulateFunction.apply(*folded)  # type: ignore[no-untyped-call]
        return unfold(info.batch_size, y), 0


class AdalnModulateDualFunction(torch.autograd.Function):
    """Autograd of `adaln_modulate_jvp`: reverse mode through the value alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        x_dot: Tensor | None,
        shift_dot: Tensor | None,
        scale_dot: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Compute value and tangent in one pass."""
        y, y_dot = _dual(x, shift, scale, x_dot, shift_dot, scale_dot, eps, backend)
        return y, y_dot

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the gradient of the value needs; the tangent has none."""
        _save(ctx, inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed."""
        return (*_gradient(ctx, dy), None, None, None, None, None)


def _tangent_of(x: Tensor, scale: Tensor, tangents: Triple, eps: float, backend: str) -> Tensor:
    """Compute y_dot from tangents that may have another dtype than their primals."""
    x_dot, *modulation_dots = tangents
    x_dot = None if x_dot is None else x_dot.to(x.dtype)
    shift_dot, scale_dot = (None if t is None else t.to(scale.dtype) for t in modulation_dots)
    x, scale = x.detach(), scale.detach()
    if backend == Backend.EAGER:
        cast = (x_dot, shift_dot, scale_dot)
        return adaln_modulate_jvp_reference((x, scale, scale), cast, eps=eps)[1]
    y_dot: Tensor = _tangent(x, scale, x_dot, shift_dot, scale_dot, eps, backend)
    return y_dot


def _apply_function(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
    y: Tensor = AdalnModulateFunction.apply(x, shift, scale, eps, backend)  # type: ignore[no-untyped-call]
    return y


_prepare_compile = forward_mode.opaque_to_compile(_apply_function)


def value(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: Backend) -> Tensor:
    """Compute y, differentiable in the modes that the backend offers."""
    if backend is Backend.EAGER and not forward_mode.active():
        return adaln_modulate_reference(x, shift, scale, eps=eps)
    _prepare_compile()
    return _apply_function(x, shift, scale, eps, backend.value)


def _eager_value_and_tangent(
    primals: tuple[Tensor, Tensor, Tensor], tangents: Triple, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute (y, y_dot) from rows that are normalised once."""
    x, shift, scale = primals
    if scale.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    wide = compute_dtype(x.dtype)
    x_hat, _, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], None, None, eps)
    y = x_hat * (1.0 + scale.to(wide)) + shift.to(wide)
    with torch.no_grad():
        y_dot = tangent_of_normalised(x_hat, rstd, scale, tangents)
    return y.to(x.dtype), y_dot.to(x.dtype)


def value_and_tangent(
    primals: tuple[Tensor, Tensor, Tensor], tangents: Triple, eps: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Compute (y, y_dot) in one pass; autograd tracks y alone."""
    forward_mode.refuse_tangents(_NO_TANGENT_OF_PAIR, *primals, *tangents)
    if backend is Backend.EAGER:
        return _eager_value_and_tangent(primals, tangents, eps)
    dots = (None if t is None else t.detach() for t in tangents)
    y, y_dot = AdalnModulateDualFunction.apply(  # type: ignore[no-untyped-call]
        *primals, *dots, eps, backend.value
    )
    return y, y_dot.detach()
