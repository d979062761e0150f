# SPDX-License-Identifier: Apache-2.0
"""Autograd of the time features: operators that run kernels, and the Functions above them.

Reverse mode is the exact derivative, forward mode is band-limited by the tangent width: they
differ on purpose. A kernel runs inside a `torch.library` operator, which has no forward mode and
loses a tangent without a word, so it is called only by the rules of a Function.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from disca_kernels import forward_mode
from disca_kernels.backend import Backend
from disca_kernels.batching import fold, folding_rule, unfold
from disca_kernels.ops.timestep_features.reference import (
    compute_dtype,
    timestep_features_jvp_reference,
    timestep_features_reference,
    timestep_features_vjp_reference,
)

_NO_TANGENT_OF_PAIR = (
    "timestep_features_jvp: an operand carries a tangent of its own (torch.func.jvp or "
    "forward_ad.dual_level is active), which would silently be lost. Inside forward mode call "
    "timestep_features; its tangent comes by itself"
)
_NO_SECOND_DERIVATIVE = (
    "timestep_features: the gradient that a kernel computes cannot be differentiated again, in "
    "either mode (which includes a backward pass inside forward_ad.dual_level). backend='eager' "
    "can do that"
)

Width = Tensor | float


def _launchers(backend: str) -> ModuleType:
    """Import the module whose kernels `backend` names; only now, since it may load a compiler."""
    return import_module(f"disca_kernels.ops.timestep_features.{backend}")


@torch.library.custom_op("disca_kernels::timestep_features_fwd", mutates_args=())
def _fwd(t: Tensor, dim: int, scale: float, max_period: float, backend: str) -> Tensor:
    features: Tensor = _launchers(backend).launch_fwd(t, dim, scale, max_period)
    return features


@torch.library.custom_op("disca_kernels::timestep_features_bwd", mutates_args=())
def _bwd(
    dfeatures: Tensor, t: Tensor, dim: int, scale: float, max_period: float, backend: str
) -> Tensor:
    dt: Tensor = _launchers(backend).launch_bwd(dfeatures, t, dim, scale, max_period)
    return dt


@torch.library.custom_op("disca_kernels::timestep_features_dual", mutates_args=())
def _dual(
    t: Tensor,
    t_dot: Tensor,
    widths: Tensor | None,
    width: float,
    dim: int,
    scale: float,
    max_period: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    h = width if widths is None else widths
    launch = _launchers(backend).launch_jvp
    features, features_dot = launch(t, t_dot, h, dim, scale, max_period, with_value=True)
    return features, features_dot


@torch.library.custom_op("disca_kernels::timestep_features_tangent", mutates_args=())
def _tangent(
    t: Tensor,
    t_dot: Tensor,
    widths: Tensor | None,
    width: float,
    dim: int,
    scale: float,
    max_period: float,
    backend: str,
) -> Tensor:
    h = width if widths is None else widths
    launch = _launchers(backend).launch_jvp
    features_dot: Tensor = launch(t, t_dot, h, dim, scale, max_period, with_value=False)[1]
    return features_dot


def _features_like(t: Tensor, dim: int) -> Tensor:
    return torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)


@_fwd.register_fake
def _(t: Tensor, dim: int, *_: Any) -> Tensor:
    return _features_like(t, dim)


@_bwd.register_fake
def _(dfeatures: Tensor, t: Tensor, *_: Any) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


@_dual.register_fake
def _(t: Tensor, t_dot: Tensor, widths: Any, width: float, dim: int, *_: Any) -> Any:
    return _features_like(t, dim), _features_like(t, dim)


@_tangent.register_fake
def _(t: Tensor, t_dot: Tensor, widths: Any, width: float, dim: int, *_: Any) -> Tensor:
    return _features_like(t, dim)


for _operator in (_fwd, _bwd, _dual, _tangent):
    _operator.register_vmap(folding_rule(_operator))


class TimestepFeaturesGradientFunction(torch.autograd.Function):
    """The backward kernel, with an error where PyTorch would ask for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dfeatures: Tensor, t: Tensor, dim: int, scale: float, max_period: float, backend: str
    ) -> Tensor:
        """Compute dt."""
        dt: Tensor = _bwd(dfeatures, t, dim, scale, max_period, backend)
        return dt

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Tensor:
        """Refuse."""
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _gradient(ctx: Any, dfeatures: Tensor | None) -> Tensor | None:
    """Compute the exact dt with the backend that computed the value."""
    if dfeatures is None:
        return None
    t = ctx.saved_tensors[0]
    options = ctx.dim, ctx.scale, ctx.max_period
    if ctx.backend == Backend.EAGER:
        dim, scale, max_period = options
        return timestep_features_vjp_reference(
            dfeatures, t, dim, scale=scale, max_period=max_period
        )
    dt: Tensor = TimestepFeaturesGradientFunction.apply(  # type: ignore[no-untyped-call]
        dfeatures, t, *options, ctx.backend
    )
    return dt


class TimestepFeaturesFunction(torch.autograd.Function):
    """Autograd of `timestep_features`: exact gradient, band-limited and detached tangent."""

    @staticmethod
    def forward(
        t: Tensor,
        widths: Tensor | None,
        width: float,
        dim: int,
        scale: float,
        max_period: float,
        backend: str,
    ) -> Tensor:
        """Compute the features; PyTorch passes plain tensors without their tangents."""
        if backend == Backend.EAGER:
            return timestep_features_reference(t, dim, scale=scale, max_period=max_period)
        features: Tensor = _fwd(t, dim, scale, max_period, backend)
        return features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the same tensors for both modes."""
        t, widths, ctx.width, ctx.dim, ctx.scale, ctx.max_period, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, widths)
        ctx.save_for_forward(t, widths)

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute dt; the value does not depend on the width."""
        return _gradient(ctx, dfeatures), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t_dot: Tensor | None, *_: Tensor | None) -> Tensor:
        """Compute the tangent alone; the width's own tangent, if it has one, has no effect."""
        t, widths = ctx.saved_tensors
        forward_mode.refuse_second_tangent("timestep_features", t, t_dot)
        with torch.no_grad():
            t = t.detach()
            if t_dot is None:
                return _zeros(t, ctx.dim)
            t_dot = t_dot.detach().to(t.dtype)
            widths = None if widths is None else widths.detach()
            options = ctx.dim, ctx.scale, ctx.max_period
            features_dot = _tangent_of(t, t_dot, widths, ctx.width, options, ctx.backend)
            return features_dot.detach()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """Fold the mapped dimension into the batch."""
        folded = fold(info.batch_size, in_dims, args)
        features: Tensor = TimestepFeaturesFunction.apply(*folded)  # type: ignore[no-untyped-call]
        return unfold(info.batch_size, features), 0


class TimestepFeaturesDualFunction(torch.autograd.Function):
    """Autograd of `timestep_features_jvp`: reverse mode through the value alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        t: Tensor,
        t_dot: Tensor,
        widths: Tensor | None,
        width: float,
        dim: int,
        scale: float,
        max_period: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Compute features and tangent in one pass."""
        features, features_dot = _dual(t, t_dot, widths, width, dim, scale, max_period, backend)
        return features, features_dot

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the gradient of the value needs; the tangent has none."""
        t, _, _, _, ctx.dim, ctx.scale, ctx.max_period, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(t)

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute dt."""
        return _gradient(ctx, dfeatures), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        """Refuse: an operand has a tangent of forward-mode AD beside the one that was passed."""
        raise NotImplementedError(_NO_TANGENT_OF_PAIR)


def _tangent_of(
    t: Tensor,
    t_dot: Tensor,
    widths: Tensor | None,
    width: float,
    options: tuple[int, float, float],
    backend: str,
) -> Tensor:
    """Compute the tangent alone; `options` are dim, scale and max_period."""
    if backend == Backend.EAGER:
        dim, scale, max_period = options
        h = width if widths is None else widths
        return timestep_features_jvp_reference(
            t, t_dot, dim, scale=scale, max_period=max_period, tangent_width=h
        )[1]
    features_dot: Tensor = _tangent(t, t_dot, widths, width, *options, backend)
    return features_dot


def _zeros(t: Tensor, dim: int) -> Tensor:
    return torch.zeros((t.shape[0], dim), dtype=compute_dtype(t.dtype), device=t.device)


def _split(width: Width) -> tuple[Tensor | None, float]:
    """Split a width into the tensor and the number that an operator can take."""
    return (width, 0.0) if isinstance(width, Tensor) else (None, float(width))


def _apply_function(
    t: Tensor,
    widths: Tensor | None,
    width: float,
    dim: int,
    scale: float,
    max_period: float,
    backend: str,
) -> Tensor:
    features: Tensor = TimestepFeaturesFunction.apply(  # type: ignore[no-untyped-call]
        t, widths, width, dim, scale, max_period, backend
    )
    return features


def _apply_dual_function(
    t: Tensor,
    t_dot: Tensor,
    widths: Tensor | None,
    width: float,
    dim: int,
    scale: float,
    max_period: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    features, features_dot = TimestepFeaturesDualFunction.apply(  # type: ignore[no-untyped-call]
        t, t_dot, widths, width, dim, scale, max_period, backend
    )
    return features, features_dot.detach()


_prepare_compile = forward_mode.opaque_to_compile(_apply_function)
_prepare_compile_dual = forward_mode.opaque_to_compile(_apply_dual_function)


def value(
    t: Tensor, dim: int, width: Width, scale: float, max_period: float, backend: Backend
) -> Tensor:
    """Compute the features, differentiable in the modes that the backend offers."""
    if backend is Backend.EAGER and not forward_mode.active():
        return timestep_features_reference(t, dim, scale=scale, max_period=max_period)
    _prepare_compile()
    return _apply_function(t, *_split(width), dim, scale, max_period, backend.value)


def value_and_tangent(
    t: Tensor,
    t_dot: Tensor | None,
    dim: int,
    width: Width,
    scale: float,
    max_period: float,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Compute (features, features_dot) in one pass; autograd tracks the features alone."""
    if t_dot is None:
        return value(t, dim, width, scale, max_period, backend), _zeros(t, dim)
    if backend is Backend.EAGER:
        features = timestep_features_reference(t, dim, scale=scale, max_period=max_period)
        with torch.no_grad():
            _, features_dot = timestep_features_jvp_reference(
                t, t_dot, dim, scale=scale, max_period=max_period, tangent_width=width
            )
        return features, features_dot
    _prepare_compile_dual()
    return _apply_dual_function(t, t_dot, *_split(width), dim, scale, max_period, backend.value)
