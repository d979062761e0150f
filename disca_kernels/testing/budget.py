# SPDX-License-Identifier: Apache-2.0
"""Error budgets: a kernel may be about twice as wrong as eager PyTorch in the same dtype."""

from typing import NamedTuple

import torch
from torch import Tensor

_SHOWN = 5


class Budget(NamedTuple):
    """Measured errors and what was allowed.

    Attributes:
        max_error: largest absolute error against the float64 reference.
        max_allowed: the allowance at the element that came closest to its own.
        rms_error: root mean square of the error.
        rms_allowed: the allowance for `rms_error`.
    """

    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float


def assert_within_budget(
    actual: Tensor,
    reference64: Tensor,
    eager_same_dtype: Tensor,
    *,
    name: str,
    factor: float = 2.0,
) -> Budget:
    """Assert that a kernel's error is within `factor` eager errors and one rounding.

    With e = actual - reference64, E = eager_same_dtype - reference64, both in float64, and u the
    unit roundoff of the dtype (half the spacing at 1), two conditions must hold:

        max:  |e_i|  <= factor * max|E|  + u * |reference64_i|      for every element i
        rms:  rms(e) <= factor * rms(E) + u * rms(reference64)

    The first catches one wrong element, the second an error that is small but everywhere. The
    smallest normal number of the dtype is added to both, since flushing it to zero is allowed. An
    element that is not finite in eager must be the same kind of non-finite in `actual`, no other
    may be, and neither takes part in the norms.

    Args:
        actual: what the kernel computed.
        reference64: the same result computed in float64, of the same shape.
        eager_same_dtype: the same result by eager PyTorch from the inputs that the kernel got;
            its shape and dtype are what `actual` must have.
        name: label of the result in the message, such as "adaln_modulate dx".
        factor: how many eager errors are allowed.

    Returns:
        The measured errors beside their allowances.

    Raises:
        AssertionError: shape, dtype, non-finite pattern or an error bound does not hold; the
            message counts the bad elements and shows the first of them.
        ValueError: the comparison itself is meaningless (a reference that is not float64, eager
            and actual being one tensor).
    """
    _check_operands(actual, reference64, eager_same_dtype, name)
    actual64, reference64, eager64 = (
        t.detach().cpu().double() for t in (actual, reference64, eager_same_dtype)
    )
    if actual64.numel() == 0:
        return Budget(0.0, 0.0, 0.0, 0.0)
    _check_non_finite(actual64, reference64, eager64, name)

    finite = eager64.isfinite()
    zero = torch.zeros_like(reference64)
    error = torch.where(finite, actual64 - reference64, zero)
    eager_error = torch.where(finite, eager64 - reference64, zero)
    magnitude = torch.where(finite, reference64.abs(), zero)
    info = torch.finfo(actual.dtype)
    unit = info.eps / 2

    allowed = factor * eager_error.abs().max() + unit * magnitude + info.tiny
    bad = error.abs() > allowed
    if bad.any():
        expected = torch.where(finite, reference64, eager64)
        raise AssertionError(
            f"{name}: error above its budget of {factor:g} eager errors "
            f"(max {eager_error.abs().max().item():.3e}) plus one {actual.dtype} rounding\n"
            + _describe(bad, actual64, expected, eager64)
        )
    count = max(int(finite.sum()), 1)
    rms_error = (error.square().sum() / count).sqrt().item()
    rms_eager = (eager_error.square().sum() / count).sqrt().item()
    rms_reference = (magnitude.square().sum() / count).sqrt().item()
    rms_allowed = factor * rms_eager + unit * rms_reference + info.tiny
    if rms_error > rms_allowed:
        raise AssertionError(
            f"{name}: rms error {rms_error:.3e} is above its budget {rms_allowed:.3e} = {factor:g} "
            f"x eager rms error {rms_eager:.3e} + one {actual.dtype} rounding of rms value "
            f"{rms_reference:.3e}; mean error {error.sum().item() / count:+.3e} over {count} "
            "elements"
        )
    closest = int((error.abs() / allowed).argmax())
    return Budget(
        error.abs().max().item(), allowed.flatten()[closest].item(), rms_error, rms_allowed
    )


def _check_operands(actual: Tensor, reference64: Tensor, eager: Tensor, name: str) -> None:
    """Reject comparisons that could not fail and results of the wrong kind."""
    if reference64.dtype != torch.float64:
        raise ValueError(f"{name}: the reference must be float64, got {reference64.dtype}")
    if actual is eager:
        raise ValueError(f"{name}: actual and eager are one tensor; the comparison could not fail")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, eager has {eager.dtype}")
    shapes = [tuple(t.shape) for t in (actual, reference64, eager)]
    if len(set(shapes)) != 1:
        raise AssertionError(
            f"{name}: shape {shapes[0]}, the reference has {shapes[1]}, eager has {shapes[2]}"
        )


def _kind(values: Tensor) -> Tensor:
    """Map finite, NaN, +inf and -inf to 0, 1, 2 and 3."""
    kind = values.isnan().to(torch.uint8)
    return kind + 2 * values.isposinf() + 3 * values.isneginf()


def _check_non_finite(actual: Tensor, reference: Tensor, eager: Tensor, name: str) -> None:
    """Require NaN and infinity exactly where eager has them, and a reference that explains them."""
    unexplained = eager.isfinite() & ~reference.isfinite()
    if unexplained.any():
        raise AssertionError(
            f"{name}: eager is finite where the reference is not\n"
            + _describe(unexplained, actual, reference, eager)
        )
    differs = _kind(actual) != _kind(eager)
    if differs.any():
        raise AssertionError(
            f"{name}: NaN or infinity where eager has none, or the reverse\n"
            + _describe(differs, actual, reference, eager)
        )


def _describe(bad: Tensor, actual: Tensor, reference: Tensor, eager: Tensor) -> str:
    """Count the bad elements and list the first, with their values."""
    count = int(bad.sum())
    lines = [f"  {count} of {bad.numel()} elements ({100 * count / bad.numel():.3g} %) are bad"]
    for row in bad.nonzero()[:_SHOWN]:
        index = tuple(row.tolist())
        got, want, base = actual[index].item(), reference[index].item(), eager[index].item()
        lines.append(
            f"  at {list(index)}: got {got:.8g}, reference {want:.8g}, eager {base:.8g}, "
            f"error {got - want:+.3e}"
        )
    return "\n".join(lines)
