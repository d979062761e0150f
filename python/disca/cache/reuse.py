# SPDX-License-Identifier: Apache-2.0
"""Reuse: the tokens before the head stand in for the skipped ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disca.cache.policy import TokenPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["Reuse"]


class Reuse(TokenPolicy):
    """Returns the tokens of the last full step unchanged.

    The order-0 forecast of the last layer: training-free, and free of cost but for the embedders
    and the head, which see the current time and so still adapt the output. A learned predictor has
    to beat it. The cache is written at full steps only.

    Args:
        full_steps: the steps that run the whole host; see :func:`disca.sample.resolve_full_steps`.
        allow_idle: accept a list in which every step is full.
    """

    name = "reuse"

    def __init__(self, full_steps: str | Sequence[int], *, allow_idle: bool = False) -> None:
        self.spec = full_steps
        self.idle_ok = allow_idle
        self.full: frozenset[int] = frozenset()

    def prepare(self) -> tuple[str, ...]:
        """Resolve the full steps."""
        self.full = self.full_steps(self.spec)
        return ("tokens before the head",)

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute at the listed steps."""
        return step.index in self.full

    def compute(self, step: StepInput, state: State) -> State:
        """Run every block and keep the tokens."""
        state = self.host.run(state)
        self.store["tokens"] = state.tokens
        return state

    def skip(self, step: StepInput, state: State) -> State:
        """Put the kept tokens into the state."""
        return state.with_tokens(self.replay(state, self.store["tokens"]))

    def replay(self, state: State, cache: Tensor) -> Tensor:
        """Return the tokens [B, N, C] of a skipped step: the cache as it is."""
        return cache
