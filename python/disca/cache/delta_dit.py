# SPDX-License-Identifier: Apache-2.0
"""Δ-DiT: what a group of blocks added to its input is kept, not what it returned."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from disca.cache.interval import Interval
from disca.cache.policy import TokenPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["DeltaDiT"]

Group = Literal["rear", "front"]


class DeltaDiT(TokenPolicy):
    """Replaces a group of blocks by the offset that it last added (Δ-DiT, arXiv 2406.01125).

    At a full step the offset ``d = group(tokens) - tokens`` [B, N, C] is kept; at a skipped step
    the group returns ``tokens + d`` for the tokens of now, and the other blocks run. Before step
    ``boundary`` the group is the last ``blocks`` blocks (they make details, which do not matter
    yet), from there on the first ``blocks`` blocks (they make the outline, which is settled). Full
    steps are 0, N, 2N, ...

    Args:
        interval: N, a full step every so many steps.
        boundary: b, the first step, counted from 0, that skips front blocks; None for half of the
            run, 0 for front blocks alone, the number of steps for rear blocks alone.
        blocks: N_c, the number of blocks skipped; None for three quarters of the host's.

    Raises:
        UserError: an interval below 2; at reset, a boundary outside the run, or more blocks than
            the host has, which may have none.
    """

    name = "delta-dit"

    def __init__(
        self, interval: int, *, boundary: int | None = None, blocks: int | None = None
    ) -> None:
        self.interval = Interval(self.name, interval)
        self.boundary, self.blocks = boundary, blocks
        self._boundary = self._count = 0

    def prepare(self) -> tuple[str, ...]:
        """Fit the group and the boundary to host and run."""
        self.interval.check(self.steps)
        total = len(self.host.blocks)
        if not total:
            raise UserError(
                "policy 'delta-dit' replaces blocks, but the host has no blocks; use a policy that "
                "reads the output, such as 'easycache'"
            )
        self._count = max(1, 3 * total // 4) if self.blocks is None else self.blocks
        if not 1 <= self._count <= total:
            raise UserError(
                f"policy 'delta-dit': blocks must be between 1 and {total}, the number of blocks "
                f"of the host, got {self._count}"
            )
        self._boundary = self.steps // 2 if self.boundary is None else self.boundary
        if not 0 <= self._boundary <= self.steps:
            raise UserError(
                f"policy 'delta-dit': boundary must be between 0 and {self.steps}, the number of "
                f"steps, got {self._boundary}"
            )
        skipped = [i for i in range(self.steps) if not self.interval.full(i)]
        names = []
        for group in dict.fromkeys(self._group(i) for i in skipped):
            start, stop = self._span(group)
            names.append(f"blocks {start} to {stop - 1}: offset")
        return tuple(names)

    def _group(self, index: int) -> Group:
        """Return the group that a skipped step replaces."""
        return "rear" if index < self._boundary else "front"

    def _span(self, group: Group) -> tuple[int, int]:
        """Return the first block of a group and the one after its last."""
        total = len(self.host.blocks)
        return (total - self._count, total) if group == "rear" else (0, self._count)

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute every N steps."""
        return self.interval.full(step.index)

    def compute(self, step: StepInput, state: State) -> State:
        """Run every block and keep the offsets that the steps up to the next full one need."""
        self.store.clear()
        following = range(step.index + 1, step.index + self.interval.interval)
        needed = {self._group(i) for i in following if i < self.steps}
        spans = {group: self._span(group) for group in needed}
        edges = sorted(
            {0, len(self.host.blocks), *(edge for span in spans.values() for edge in span)}
        )
        tokens = {0: state.tokens}
        for start, stop in pairwise(edges):
            state = self.host.run(state, start, stop)
            tokens[stop] = state.tokens
        for group, (start, stop) in spans.items():
            self.store[group] = tokens[stop] - tokens[start]
        return state

    def skip(self, step: StepInput, state: State) -> State:
        """Run the blocks outside the group and add the kept offset in its place."""
        group = self._group(step.index)
        start, stop = self._span(group)
        state = self.host.run(state, 0, start)
        state = state.with_tokens(state.tokens + self.store[group])
        return self.host.run(state, stop)
