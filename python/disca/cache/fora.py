# SPDX-License-Identifier: Apache-2.0
"""FORA: attention and MLP outputs of every block are kept and reused between full steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from disca.cache.interval import Interval
from disca.cache.policy import SubLayerPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["Fora"]


class Fora(SubLayerPolicy):
    """Reuses the outputs of attention and MLP of every block (FORA, arXiv 2407.01425).

    At a full step the output of each sub-layer is kept, before its gate. At the ``interval - 1``
    steps that follow, the kept outputs are added through the *current* gates. Full steps are 0, N,
    2N, ...; the last step is not forced.

    Args:
        interval: N, a full step every so many steps.
        first: full steps at the start.
    """

    name = "fora"

    def __init__(self, interval: int, *, first: int = 1) -> None:
        self.interval = Interval(self.name, interval, first)

    def prepare(self) -> tuple[str, ...]:
        """Check the interval against the run and the blocks for sub-layers."""
        self.interval.check(self.steps)
        return super().prepare()

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute every N steps."""
        return self.interval.full(step.index)

    def compute(self, step: StepInput, state: State) -> State:
        """Run every sub-layer and keep its output."""

        def keep(at: tuple[int, str], compute: Callable[[], Tensor]) -> Tensor:
            self.store[at] = update = compute()
            return update

        return self.walk(state, keep)

    def skip(self, step: StepInput, state: State) -> State:
        """Add the kept outputs through the current gates."""
        return self.walk(state, lambda at, compute: self.store[at])
