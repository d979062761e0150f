# SPDX-License-Identifier: Apache-2.0
"""EasyCache: the output is taken to change with its input at the rate last seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.policy import OutputPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput

__all__ = ["EasyCache"]


class EasyCache(OutputPolicy):
    """Reuses output minus input while little change is expected (EasyCache, arXiv 2507.02860).

    With x the host's input and v its output, |.| the mean of absolute values over the whole batch,
    and a, b the last two computed steps (b the later one), a step that is not forced adds

        ``k |x - x_before| / |v_b|``  with  ``k = |v_b - v_a| / |x_b - x_a|``

    to an error that starts at 0 after each computed step. While the error is below the threshold
    the step is skipped and its output is ``x + v_b - x_b``. The first ``first`` steps and the last
    one are computed in any case, and so is a step that has not yet two computed ones before it.

    Args:
        threshold: tau, above 0; the released HunyuanVideo script has 0.025.
        first: steps computed at the start (``ret_steps`` of the released code).

    Raises:
        UserError: a threshold that never skips, or ``first`` below 1.
    """

    name = "easycache"

    def __init__(self, threshold: float, *, first: int = 5) -> None:
        if not threshold > 0:
            raise UserError(
                f"policy 'easycache': a threshold of {threshold} never skips; use one above 0, for "
                "example 0.025, or the policy 'none'"
            )
        if first < 1:
            raise UserError(
                f"policy 'easycache': at least the first step is computed, got first={first}"
            )
        self.threshold, self.first = threshold, first

    def prepare(self) -> tuple[str, ...]:
        """Check that a step is left to skip."""
        forced = max(self.first, 2) + 1
        if forced >= self.steps:
            raise UserError(
                f"policy 'easycache': the first {forced - 1} steps and the last are computed and "
                f"the run has {self.steps}, so nothing would be skipped; lower first or take more "
                "steps"
            )
        self._error = 0.0
        self._rate: float | None = None
        self._level = 0.0
        return super().prepare()

    def computes(self, step: StepInput) -> bool:
        """Add this step's expected change and compare it with the threshold."""
        before = self.store.get("input")
        self.store["input"] = step.x
        forced = step.index < self.first or step.index == self.steps - 1
        if forced or before is None or self._rate is None:
            self._error = 0.0
            return True
        self._error += self._rate * _ratio(_mean(step.x - before), self._level)
        # An undefined ratio (0 / 0) compares as false and computes.
        if self._error < self.threshold:
            return False
        self._error = 0.0
        return True

    def compute(self, step: StepInput) -> Tensor:
        """Run the host and measure how its output changed with its input."""
        velocity = self.evaluate(step)
        if "output" in self.store:
            moved = _mean(step.x - self.store["full input"])
            self._rate = _ratio(_mean(velocity - self.store["output"]), moved)
        self.store["output"], self.store["full input"] = velocity, step.x
        self._level = _mean(velocity)
        return velocity

    def skip(self, step: StepInput) -> Tensor:
        """Return the last computed output, moved as far as the input moved."""
        return step.x + (self.store["output"] - self.store["full input"])


def _mean(x: Tensor) -> float:
    return float(x.float().abs().mean())


def _ratio(change: float, level: float) -> float:
    """Return change / level, infinite where the level is 0."""
    return change / level if level else float("inf")
