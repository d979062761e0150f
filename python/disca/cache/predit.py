# SPDX-License-Identifier: Apache-2.0
"""PrediT: outputs of the skipped steps are forecast by a linear multistep method."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from disca.cache.differences import Differences
from disca.cache.policy import OutputPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput

__all__ = ["PrediT"]

_KEY = "output"


class PrediT(OutputPolicy):
    """Forecasts outputs with Adams' methods on uneven steps (after PrediT, arXiv 2602.18093).

    With outputs u_n, u_{n-1}, ... of the computed steps at times t_n, t_{n-1}, ..., P_n the
    polynomial of degree ``order`` through the last ``order + 1`` of them and f its slopes:

    - predictor (Adams-Bashforth): a skipped step at t takes ``P_n(t)``, which is ``u_n + h f_n``
      for order 1 and ``u_n + h [(1 + w/2) f_n - (w/2) f_{n-1}]`` for order 2, with h = t - t_n and
      w = h / (t_n - t_{n-1});
    - horizon: ``J = floor(threshold / rate^(1 / (order + 1)))`` steps, at most ``longest``, are
      skipped after a computed one, with ``rate = |u_n - u_{n-1}| / (m |u_{n-1}|)``, m the steps
      from n-1 to n and |.| the mean of absolute values over the batch;
    - corrector (Adams-Moulton): where the rate at the next computed step reaches ``corrector``, the
      steps skipped before it are summed anew with the polynomial that goes through its output too,
      and the sample is moved by the difference: ``sum (t_i - r_i) (P_n(t_i) - P_{n+1}(t_i))``.

    The paper's constants were not available; degree, rate and corrector are the textbook's.

    Args:
        threshold: scale of the horizon, above 0.
        order: degree of the polynomials, 1 or 2; lower until there are enough outputs.
        longest: most steps skipped in a row.
        first: steps computed at the start, at least 2.
        corrector: rate from which the corrector acts; 0 is always, infinity, the default, never.

    Raises:
        UserError: a setting out of range.
    """

    name = "predit"

    def __init__(
        self,
        threshold: float,
        *,
        order: int = 1,
        longest: int = 4,
        first: int = 3,
        corrector: float = inf,
    ) -> None:
        if not threshold > 0:
            raise UserError(
                f"policy 'predit': a threshold of {threshold} never skips; use one above 0, or the "
                "policy 'none'"
            )
        if order not in (1, 2):
            raise UserError(f"policy 'predit': order is 1 or 2, got {order}")
        if longest < 1:
            raise UserError(
                f"policy 'predit': longest={longest} never skips; use 1 or more, or the policy "
                "'none'"
            )
        if first < 2:
            raise UserError(
                "policy 'predit': a forecast needs two outputs, so the first two steps are always "
                f"computed, got first={first}"
            )
        if not corrector >= 0:
            raise UserError(f"policy 'predit': corrector is a rate from 0 on, got {corrector}")
        self.threshold, self.order, self.longest = threshold, order, longest
        self.first, self.corrector = first, corrector

    def prepare(self) -> tuple[str, ...]:
        """Check that a step is left to skip."""
        if self.first >= self.steps:
            raise UserError(
                f"policy 'predit': the first {self.first} steps are computed and the run has "
                f"{self.steps}, so nothing would be skipped; lower first or take more steps"
            )
        self._past = Differences(self.store, self.order, divided=True)
        self._last = self._next = 0
        return super().prepare()

    def computes(self, step: StepInput) -> bool:
        """Compute the first steps and then the step after each horizon."""
        return step.index < self.first or step.index >= self._next

    def compute(self, step: StepInput) -> Tensor:
        """Run the host, correct what was forecast since the last time, and set the horizon."""
        velocity = self.evaluate(step)
        rate = self._rate(step, velocity)
        skipped = range(self._last + 1, step.index)
        corrects = len(skipped) > 0 and rate >= self.corrector
        forecast = self._integral(skipped) if corrects else None
        self._past.start(self.schedule[step.index])
        self._past.put(_KEY, velocity)
        self._last, self._next = step.index, step.index + 1 + self._horizon(rate)
        if forecast is None:
            return velocity
        # The sampler takes a velocity, so the correction of the sample goes through this step's.
        length = self.schedule[step.index] - self.schedule[step.index + 1]
        return velocity + (self._integral(skipped) - forecast) / length

    def skip(self, step: StepInput) -> Tensor:
        """Return the forecast."""
        return self._past.forecast(_KEY, self.schedule[step.index])

    def _integral(self, steps: range) -> Tensor:
        """Return what the polynomial of now adds to the sample over some steps."""
        times = self.schedule
        weights = [
            [(times[i] - times[i + 1]) * weight for weight in self._past.weights(times[i])]
            for i in steps
        ]
        return self._past.combine(_KEY, [sum(column) for column in zip(*weights, strict=True)])

    def _rate(self, step: StepInput, velocity: Tensor) -> float:
        """Return the relative change of the output a step; infinite at the first step."""
        if step.index == 0:
            return inf
        before = self.store[_KEY, 0]
        level = (step.index - self._last) * float(before.float().abs().mean())
        change = float((velocity - before).float().abs().mean())
        return change / level if level else inf

    def _horizon(self, rate: float) -> int:
        """Return how many steps to skip after a computed one."""
        if not rate:
            return self.longest
        # An undefined rate, of outputs that are not finite, skips nothing.
        ahead = self.threshold / rate ** (1 / (self.order + 1))
        return int(min(ahead, self.longest)) if ahead >= 1 else 0
