# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer: features of the skipped steps are forecast from finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from disca.cache.differences import Differences
from disca.cache.interval import Interval
from disca.cache.policy import SubLayerPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["TaylorSeer"]

Scope = Literal["sublayers", "whole", "last"]
Kind = Literal["step", "divided"]

_HIGHEST_ORDER = 2


class TaylorSeer(SubLayerPolicy):
    """Forecasts features with a truncated Taylor series (TaylorSeer, arXiv 2503.06923).

    At a full step, g steps after the full step before it, the differences of a feature F are
    ``d_0 = F`` and ``d_{i+1} = (d_i - d_i_before) / g``; k steps later the feature is taken to be
    ``sum_{i <= order} d_i k^i / i!``. Full steps are 0 to ``first - 1``, then one after every
    ``interval - 1`` others. Until there are enough full steps for ``order`` differences, there are
    fewer terms.

    Args:
        interval: N, a full step every so many steps.
        order: highest difference, 0 to 2; order 0 reuses the features.
        first: full steps at the start (``first_enhance`` of the released code).
        scope: what is forecast. ``"sublayers"``: the outputs of attention and MLP of every block
            before their gates, as in the paper; ``"whole"``: what all blocks together add to the
            tokens; ``"last"``: the tokens before the head.
        differences: ``"step"``: over step numbers, as above and in the released code, which starts
            them at step ``first - 1``; ``"divided"``: Newton's divided differences over the times
            t, from step 0 on, exact for polynomials in t of that order on uneven steps too.

    Raises:
        UserError: an interval that never skips, or a setting that is none of the above.
    """

    name = "taylorseer"

    def __init__(
        self,
        interval: int,
        *,
        order: int = 1,
        first: int = 1,
        scope: Scope = "sublayers",
        differences: Kind = "step",
    ) -> None:
        self.interval = Interval(self.name, interval, first)
        if not 0 <= order <= _HIGHEST_ORDER:
            raise UserError(f"policy 'taylorseer': order is 0, 1 or {_HIGHEST_ORDER}, got {order}")
        if scope not in get_args(Scope):
            raise UserError(
                f"policy 'taylorseer': scope is one of {', '.join(get_args(Scope))}, got {scope!r}"
            )
        if differences not in get_args(Kind):
            raise UserError(
                f"policy 'taylorseer': differences is one of {', '.join(get_args(Kind))}, "
                f"got {differences!r}"
            )
        self.order, self.scope, self.kind = order, scope, differences

    def prepare(self) -> tuple[str, ...]:
        """Check the interval against the run and, for sub-layers, the blocks."""
        self.interval.check(self.steps)
        self.differences = Differences(self.store, self.order, divided=self.kind == "divided")
        if self.scope == "sublayers":
            return super().prepare()
        return ("all blocks" if self.scope == "whole" else "tokens before the head",)

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute the first steps and then every N."""
        return self.interval.full(step.index)

    def compute(self, step: StepInput, state: State) -> State:
        """Run every block and update the differences."""
        divided = self.kind == "divided"
        self.differences.start(
            self._position(step), differentiate=divided or step.index >= self.interval.first - 1
        )
        if self.scope == "sublayers":
            return self.walk(state, self._keep)
        after = self.host.run(state)
        tokens = after.tokens
        self.differences.put("tokens", tokens - state.tokens if self.scope == "whole" else tokens)
        return after

    def skip(self, step: StepInput, state: State) -> State:
        """Put the forecasts in the place of what the blocks would compute."""
        weights = self.differences.weights(self._position(step))
        if self.scope == "sublayers":
            return self.walk(state, lambda at, compute: self.differences.combine(at, weights))
        tokens = self.differences.combine("tokens", weights)
        return state.with_tokens(state.tokens + tokens if self.scope == "whole" else tokens)

    def _keep(self, at: tuple[int, str], compute: Callable[[], Tensor]) -> Tensor:
        update = compute()
        self.differences.put(at, update)
        return update

    def _position(self, step: StepInput) -> float:
        return self.schedule[step.index] if self.kind == "divided" else float(step.index)
