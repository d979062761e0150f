# SPDX-License-Identifier: Apache-2.0
"""DisCa: a small learned network predicts the tokens of the skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from disca.cache.reuse import Reuse
from disca.errors import UserError
from disca.models.predictor_step import PredictorStep

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import Resources, StepInput, StepOutput
    from disca.models.state import State

__all__ = ["LearnedPredictor"]


class LearnedPredictor(Reuse):
    """Asks a predictor for the tokens of the skipped steps (DisCa, Eq. 5, arXiv 2602.05449).

    ``tokens = P(state, cache)``: the predictor sees the current step's embedded latents, text and
    modulation, and the tokens of the last full step. The host's own head turns the result into a
    velocity. What the predictor returns never enters the cache, so that its error reaches later
    steps through the sample alone.

    Args:
        predictor: maps the embedded state and the cache [B, N, C] to tokens [B, N, C].
        full_steps: the steps that run the whole host; see :func:`disca.sample.resolve_full_steps`.
        allow_idle: accept a list in which every step is full.
    """

    name = "disca"

    def __init__(
        self,
        predictor: Callable[[State, Tensor], Tensor],
        full_steps: str | Sequence[int],
        *,
        allow_idle: bool = False,
    ) -> None:
        super().__init__(full_steps, allow_idle=allow_idle)
        self.predictor = predictor
        self._unit: PredictorStep | None = None

    @classmethod
    def from_settings(cls, resources: Resources, **settings: Any) -> LearnedPredictor:
        """Take the predictor by its name; the first of the resources if none is named."""
        known = resources.predictors
        name = settings.pop("predictor", next(iter(known), None))
        if name not in known:
            found = ", ".join(known) or "none; train one with a stage of kind predictor"
            raise UserError(f"policy 'disca': no predictor {name!r}; there are: {found}")
        return cls(known[name], **settings)

    def prepare(self) -> tuple[str, ...]:
        """Resolve the full steps and join host and predictor to one unit."""
        self._unit = PredictorStep(self.host, self.predictor)
        return super().prepare()

    def advance(self, step: StepInput) -> StepOutput:
        """Run the host at a full step, and the joined unit from sample to sample at the others."""
        if step.index in self.full:
            return super().advance(step)
        assert self._unit is not None
        x = self._unit(step.x, step.t, step.r, step.cond, self.store["tokens"])
        return self.finish(step, x, full=False)

    def replay(self, state: State, cache: Tensor) -> Tensor:
        """Return the predicted tokens [B, N, C]."""
        return self.predictor(state, cache)
