# SPDX-License-Identifier: Apache-2.0
"""DisCa: a small learned network predicts the tokens of the skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from disca.cache.policy import OneTensorCache
from disca.models.predictor_step import PredictorStep

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import WholeStep
    from disca.models.condition import Condition
    from disca.models.host import Host
    from disca.models.state import State

__all__ = ["LearnedPredictor"]


class LearnedPredictor(OneTensorCache):
    """Asks a predictor for the tokens of the skipped steps (DisCa, Eq. 5, arXiv 2602.05449).

    ``tokens = P(state, cache)``: the predictor sees the current step's embedded latents, text and
    modulation, and the tokens of the last full step. The host's own head turns the result into a
    velocity.

    Args:
        predictor: maps the embedded state and the cache [B, N, C] to tokens [B, N, C].
        full_steps: the steps, counted from 0, that run the whole host; step 0 among them.
        allow_idle: accept a list in which every step is full.
    """

    name = "disca"

    def __init__(
        self,
        predictor: Callable[[State, Tensor], Tensor],
        full_steps: Sequence[int],
        *,
        allow_idle: bool = False,
    ) -> None:
        super().__init__(full_steps, allow_idle=allow_idle)
        self.predictor = predictor
        self._unit: PredictorStep | None = None

    def reset(self, host: Host, steps: int) -> None:
        """Forget the last run, check the full steps and join host and predictor to one unit."""
        super().reset(host, steps)
        self._unit = PredictorStep(host, self.predictor)

    def whole_step(self, index: int) -> WholeStep | None:
        """Return the predictor's unit for a step that is not a full one."""
        return None if index in self.full_steps else self._advance

    def _advance(self, x: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        assert self._unit is not None
        advanced: Tensor = self._unit(x, t, r, cond, self.skipping())
        return advanced

    def replay(self, state: State, cache: Tensor) -> Tensor:
        """Return the predicted tokens [B, N, C]."""
        return self.predictor(state, cache)
