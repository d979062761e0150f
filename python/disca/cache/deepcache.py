# SPDX-License-Identifier: Apache-2.0
"""DeepCache's form for transformers: the last blocks run on the kept output of those before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.interval import Interval
from disca.cache.policy import TokenPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["DeepCache"]


class DeepCache(TokenPolicy):
    """Keeps the tokens [B, N, C] before the last blocks and runs only those (arXiv 2312.00858).

    A skipped step is ``head(last blocks(kept tokens))`` with the modulation of now. The first
    ``first`` and the last ``final`` steps are full, and between them one in ``interval``. The
    published method keeps the deep features of a U-Net; this is the form that the release of
    HunyuanVideo-1.5 gives it, in which every block but the listed last ones returns what it stored.

    Args:
        interval: a full step every so many steps.
        computed: number of last blocks that run at every step.
        first: full steps at the start.
        final: full steps at the end.

    Raises:
        UserError: an interval below 2, or no full step at the start; at reset, no step left to
            skip, a host of fewer than two blocks, or computed blocks that leave none to skip.
    """

    name = "deepcache"

    def __init__(self, interval: int, *, computed: int = 1, first: int = 1, final: int = 0) -> None:
        self.interval = Interval(self.name, interval, first)
        if computed < 1:
            raise UserError(
                f"policy 'deepcache': at least the last block is computed, got {computed=}; the "
                "policy that computes none is 'reuse'"
            )
        if final < 0:
            raise UserError(f"policy 'deepcache': final must be at least 0, got {final}")
        self.computed, self.final = computed, final
        self._depth = 0

    def prepare(self) -> tuple[str, ...]:
        """Find the depth of the cache and check that a step is left to skip."""
        total = len(self.host.blocks)
        if not total:
            raise UserError(
                "policy 'deepcache' runs the last blocks alone, but the host has no blocks; use a "
                "policy that reads the output, such as 'easycache'"
            )
        if total == 1:
            raise UserError(
                "policy 'deepcache' runs the last blocks alone, but the host has 1 block in all; "
                "use a policy that replaces the whole stack, such as 'reuse'"
            )
        if self.computed >= total:
            raise UserError(
                f"policy 'deepcache': computed={self.computed} of {total} blocks leaves none to "
                f"skip; it must be between 1 and {total - 1}"
            )
        if not any(not self._full(index) for index in range(self.steps)):
            raise UserError(
                f"policy 'deepcache': the first {self.interval.first} and the last {self.final} of "
                f"{self.steps} steps are full, so nothing would be skipped; lower first or final"
            )
        self._depth = total - self.computed
        return (f"tokens after block {self._depth - 1}",)

    def _full(self, index: int) -> bool:
        return self.interval.full(index) or index >= self.steps - self.final

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute at the ends of the run and every N steps between them."""
        return self._full(step.index)

    def compute(self, step: StepInput, state: State) -> State:
        """Run every block and keep the tokens before the last ones."""
        state = self.host.run(state, 0, self._depth)
        self.store["tokens"] = state.tokens
        return self.host.run(state, self._depth)

    def skip(self, step: StepInput, state: State) -> State:
        """Run the last blocks on the kept tokens."""
        return self.host.run(state.with_tokens(self.store["tokens"]), self._depth)
