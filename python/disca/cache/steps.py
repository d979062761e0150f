# SPDX-License-Identifier: Apache-2.0
"""Which steps of a schedule run the whole network and which run the predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disca.errors import UserError

__all__ = ["STEP_LISTS", "StepList", "resolve_full_steps"]


@dataclass(frozen=True)
class StepList:
    """A named list of full steps.

    Attributes:
        steps: how many steps the schedule must have.
        full: the steps, counted from 0, that run the whole network.
        origin: where the list comes from.
    """

    steps: int
    full: tuple[int, ...]
    origin: str


_RELEASED = "released DisCa code"
_COMPLETED = "this package: the paper gives the number of full steps, not which"

STEP_LISTS: dict[str, StepList] = {
    "n4": StepList(20, (0, 1, 2, 5, 9, 13, 17, 19), _RELEASED),
    "n3": StepList(20, (0, 1, 2, 3, 4, 7, 10, 13, 16, 18, 19), _COMPLETED),
    "n2": StepList(20, (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 19), _COMPLETED),
    "ten-full": StepList(20, (0, 1, 2, 5, 9, 11, 13, 15, 17, 19), _RELEASED),
    "hy15": StepList(8, (0, 2, 4, 7), _RELEASED),
}
"""The lists that have a name.

``n4`` is the default of the released text-to-video code and ``ten-full`` the list of its
single-GPU script, both for 20 steps; ``hy15`` is the list of the released HunyuanVideo-1.5
image-to-video script, for 8 steps. The paper says that N = 3 and N = 2 have 11 and 13 full steps
but publishes no list: ``n3`` and ``n2`` are our completion, in the pattern of ``n4`` (the first
few steps, then every third or second, then the last).
"""


def resolve_full_steps(spec: str | Sequence[int], steps: int) -> tuple[int, ...]:
    """Turn a description of the full steps into a sorted tuple of step numbers.

    Args:
        spec: a name in :data:`STEP_LISTS`; ``"every:K"``, which computes steps 0, K, 2K, ...;
            ``"all"``; numbers as text (``"0,1,2,5"``); or a sequence of numbers.
        steps: the number of steps of the schedule.

    Returns:
        The full steps in increasing order; step 0 is always among them.

    Raises:
        UserError: an unknown name, a named list for another number of steps, a list without step
            0 (nothing would be cached yet), a step out of range or given twice.
    """
    if steps < 1:
        raise UserError(f"a schedule needs at least 1 step, got {steps}")
    if isinstance(spec, str):
        return _from_text(spec.strip(), steps)
    return _check(tuple(int(step) for step in spec), steps)


def _from_text(spec: str, steps: int) -> tuple[int, ...]:
    if spec == "all":
        return tuple(range(steps))
    if spec in STEP_LISTS:
        named = STEP_LISTS[spec]
        if named.steps != steps:
            raise UserError(
                f"step list {spec!r} is for {named.steps} steps, got {steps}; "
                f"use --steps {named.steps}, 'every:K' or an explicit list"
            )
        return named.full
    if spec.startswith("every:"):
        interval = _number(spec.removeprefix("every:"), spec)
        if interval < 1:
            raise UserError(f"the interval of 'every:K' must be at least 1, got {interval}")
        return tuple(range(0, steps, interval))
    if spec and (spec[0].isdigit() or spec[0] in "-+"):
        return _check(tuple(_number(part, spec) for part in spec.split(",")), steps)
    known = ", ".join(STEP_LISTS)
    raise UserError(
        f"unknown step list {spec!r}; known: {known}, 'every:K', 'all' or numbers such as '0,1,2,5'"
    )


def _number(text: str, spec: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"cannot read {text!r} in the step list {spec!r} as a whole number"
        ) from None


def _check(full: tuple[int, ...], steps: int) -> tuple[int, ...]:
    outside = [step for step in full if not 0 <= step < steps]
    if outside:
        raise UserError(
            f"full step {outside[0]} is out of range: a schedule of {steps} steps "
            f"has steps 0 to {steps - 1}"
        )
    twice = sorted({step for step in full if full.count(step) > 1})
    if twice:
        raise UserError(f"full step {twice[0]} is given twice")
    if 0 not in full:
        raise UserError(
            "the full steps must contain step 0: before it there is nothing in the cache"
        )
    return tuple(sorted(full))
