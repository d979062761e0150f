# SPDX-License-Identifier: Apache-2.0
"""Drivers that check a gradient or a tangent against float64, by autograd and by differences."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from disca_kernels.testing.budget import Budget, assert_within_budget

Function = Callable[..., Tensor]
Jvp = Callable[
    [tuple[Tensor, ...], tuple[Tensor | None, ...]],
    tuple[Tensor, Tensor],
]


def _double(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Widen detached copies to float64, on the host, where every reference runs."""
    return tuple(t.detach().cpu().double() for t in tensors)


def _gradients(
    function: Function, primals: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in primals]
    return torch.autograd.grad(function(*leaves), leaves, cotangent)


def central_difference(
    function: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    step: float = 1e-5,
) -> Tensor:
    """Estimate a directional derivative in float64: `(f(x + h v) - f(x - h v)) / 2h`.

    Args:
        function: takes the primals.
        primals: float64 tensors.
        tangents: the direction v; None stands for zero.
        step: h. The error is about h^2 times a third derivative, plus 1e-16 |f| / h.

    Returns:
        The estimate, in the shape of the value.

    Raises:
        ValueError: a primal is not float64, so that the differences would be rounding errors.
    """
    for index, primal in enumerate(primals):
        if primal.dtype != torch.float64:
            raise ValueError(f"primal {index} must be float64, got {primal.dtype}")

    def at(offset: float) -> Tensor:
        moved = [x if v is None else x + offset * v for x, v in zip(primals, tangents, strict=True)]
        return function(*moved)

    return (at(step) - at(-step)) / (2 * step)


def _assert_near(name: str, analytic: Tensor, estimate: Tensor, tolerance: float) -> None:
    """Compare two float64 results, one of them by differences, relative to the largest element."""
    scale = max(analytic.abs().max().item() if analytic.numel() else 0.0, 1e-6)
    error = (analytic - estimate).abs().max().item() if analytic.numel() else 0.0
    if not error <= tolerance * scale:
        raise AssertionError(
            f"{name}: differs from central differences in float64 by {error:.3e}, "
            f"allowed {tolerance:.1e} of the largest element, {scale:.3e}"
        )


def check_backward(
    function: Function,
    reference: Function,
    primals: Sequence[Tensor],
    cotangent: Tensor,
    *,
    name: str,
    eager: Function | None = None,
    tolerance: float = 1e-6,
) -> list[Budget]:
    """Check every gradient of a function against its reference in float64.

    The reference's own gradient is checked first, against central differences along the direction
    of the gradient itself, so that an error that both share is found.

    Args:
        function: what is tested; takes the primals.
        reference: the specification; takes the primals, also in float64.
        primals: every one of them is differentiated.
        cotangent: gradient of the loss with respect to the value.
        name: label in messages.
        eager: what sets the error budget, in the dtype of the primals; by default the reference.
        tolerance: how far central differences may be off, relative to the largest element.

    Returns:
        Errors and budgets, one per primal.

    Raises:
        AssertionError: a gradient is out of budget or disagrees with the differences.
    """
    wide, wide_cotangent = _double(primals), cotangent.detach().cpu().double()
    expected = _gradients(reference, wide, wide_cotangent)
    for index, gradient in enumerate(expected):
        direction = [gradient if i == index else None for i in range(len(wide))]
        along = central_difference(reference, wide, direction)
        estimate = (along * wide_cotangent).sum()
        _assert_near(f"{name} d{index}", gradient.square().sum(), estimate, tolerance)
    actual = _gradients(function, primals, cotangent)
    yardstick = _gradients(eager or reference, primals, cotangent)
    return [
        assert_within_budget(a, e, y, name=f"{name} d{index}")
        for index, (a, e, y) in enumerate(zip(actual, expected, yardstick, strict=True))
    ]


def check_jvp(
    jvp: Jvp,
    reference: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    name: str,
    eager: Function | None = None,
    tolerance: float = 1e-6,
) -> tuple[Budget, Budget]:
    """Check a value and its tangent against `torch.func.jvp` of the reference in float64.

    The tangent in float64 is itself checked against central differences.

    Args:
        jvp: what is tested: takes primals and tangents, returns value and tangent.
        reference: the specification; takes the primals, also in float64.
        primals: where to differentiate.
        tangents: in which direction; None stands for zero and is passed on as None.
        name: label in messages.
        eager: what sets the error budget, in the dtype of the primals; by default the reference.
        tolerance: how far central differences may be off, relative to the largest element.

    Returns:
        Errors and budgets of the value and of the tangent.

    Raises:
        AssertionError: either is out of budget or disagrees with the differences.
    """
    zeros = [
        torch.zeros_like(x) if v is None else v for x, v in zip(primals, tangents, strict=True)
    ]
    wide, wide_tangents = _double(primals), _double(zeros)
    expected = torch.func.jvp(reference, wide, wide_tangents)
    estimate = central_difference(reference, wide, wide_tangents)
    _assert_near(f"{name} tangent", expected[1], estimate, tolerance)
    actual = jvp(tuple(primals), tuple(tangents))
    yardstick = torch.func.jvp(eager or reference, tuple(primals), tuple(zeros))
    value, tangent = (
        assert_within_budget(a, e, y, name=f"{name} {what}")
        for what, a, e, y in zip(("value", "tangent"), actual, expected, yardstick, strict=True)
    )
    return value, tangent
