# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several operations share."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["check_eps", "check_operands", "check_tangents"]


def check_operands(
    op: str, names: str, primals: Any, tangents: Any, *, optional: int = 0
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Check that a value-and-tangent call got its operands as two tuples of the right length.

    Args:
        op: name of the operation, for the message.
        names: names of the operands, separated by commas.
        primals: what should be a tuple of tensors.
        tangents: what should be a tuple of tensors or None, one for each primal.
        optional: how many operands at the end may be left out.

    Returns:
        Primals and tangents, with None for each operand that was left out.

    Raises:
        TypeError: one of them is not a tuple or list.
        ValueError: one of them has another length.
    """
    most = names.count(",") + 1
    least = most - optional
    count = f"{least} to {most}" if optional else f"{most}"
    for what, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(
                f"{op}_jvp: {what} must be a tuple of {count} ({names}), got {type(given).__name__}"
            )
        if not least <= len(given) <= most:
            raise ValueError(
                f"{op}_jvp: {count} {what} are needed, got {len(given)}; expected ({names})"
            )
    first, second = ((*t, *(None,) * (most - len(t))) for t in (primals, tangents))
    return first, second


def check_tangents(
    op: str, names: Sequence[str], primals: Sequence[Tensor | None], tangents: Sequence[Any]
) -> None:
    """Check that each tangent is None or a tensor like its primal.

    Raises:
        TypeError: a tangent is not a tensor, or has another dtype.
        ValueError: a tangent has another shape or device, or belongs to an absent operand.
    """
    for name, primal, tangent in zip(names, primals, tangents, strict=True):
        if tangent is None:
            continue
        if not isinstance(tangent, Tensor):
            raise TypeError(
                f"{op}_jvp: {name}_dot must be a tensor or None, got {type(tangent).__name__}"
            )
        if primal is None:
            raise ValueError(f"{op}_jvp: {name}_dot was given without {name}")
        if tangent.shape != primal.shape or tangent.device != primal.device:
            raise ValueError(
                f"{op}_jvp: {name}_dot must match {name} {list(primal.shape)} on {primal.device}, "
                f"got {list(tangent.shape)} on {tangent.device}"
            )
        if tangent.dtype != primal.dtype:
            raise TypeError(
                f"{op}_jvp: {name}_dot must have the dtype of {name}, {primal.dtype}, "
                f"got {tangent.dtype}"
            )


def check_eps(op: str, eps: Any) -> None:
    """Check the constant that is added to a variance.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative or not finite.
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
