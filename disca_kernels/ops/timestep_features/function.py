# SPDX-License-Identifier: Apache-2.0
"""Autograd of the time features.

Reverse mode is the exact derivative, forward mode is band-limited by the tangent width: they differ
on purpose.
"""

from typing import Any

import torch
from torch import Tensor

from disca_kernels.backend import Backend
from disca_kernels.operation import FusedOperation
from disca_kernels.ops.timestep_features.reference import (
    compute_dtype,
    timestep_features_jvp_reference,
    timestep_features_reference,
)

Width = Tensor | float


def _reference(
    t: Tensor, widths: Tensor | None, width: float, dim: int, scale: float, max_period: float
) -> Tensor:
    return timestep_features_reference(t, dim, scale=scale, max_period=max_period)


def _jvp_reference(
    primals: tuple[Tensor, Tensor | None],
    tangents: tuple[Tensor | None, None],
    width: float,
    dim: int,
    scale: float,
    max_period: float,
) -> tuple[Tensor, Tensor]:
    t, widths = primals
    return timestep_features_jvp_reference(
        t,
        torch.zeros_like(t) if tangents[0] is None else tangents[0],
        dim,
        scale=scale,
        max_period=max_period,
        tangent_width=width if widths is None else widths,
    )


def _fake(operands: tuple[Any, ...], options: tuple[Any, ...], keep: bool) -> list[Tensor]:
    t, (_, dim, *_) = operands[0], options
    return [torch.empty((t.shape[0], dim), dtype=compute_dtype(t.dtype), device=t.device)]


_OPERATION = FusedOperation(
    "timestep_features",
    operands=("t", "widths"),
    options="float width, int dim, float scale, float max_period",
    reference=_reference,
    jvp_reference=_jvp_reference,
    fake=_fake,
    saved=("t",),
    constant=("widths",),
)


def value(
    t: Tensor, dim: int, width: Width, scale: float, max_period: float, backend: Backend
) -> Tensor:
    """Compute the features, differentiable in the modes that the backend offers."""
    widths, number = _split(width)
    options = number, dim, scale, max_period
    return _OPERATION.value((t, widths), options, backend)[0]


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
    widths, number = _split(width)
    options = number, dim, scale, max_period
    (features,), (features_dot,) = _OPERATION.value_and_tangent(
        (t, widths), (t_dot, None), options, backend
    )
    return features, features_dot


def _split(width: Width) -> tuple[Tensor | None, float]:
    """Split a width into the tensor and the number that an operator can take.

    A width may come from the times, (t - r) / 2; it shapes the tangent and has none itself.
    """
    return (width.detach(), 0.0) if isinstance(width, Tensor) else (None, float(width))
