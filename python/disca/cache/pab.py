# SPDX-License-Identifier: Apache-2.0
"""PAB: the outputs of attention are broadcast to the steps that follow; MLPs are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from disca.cache.interval import Interval
from disca.cache.policy import SubLayerPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["PyramidAttentionBroadcast"]


class PyramidAttentionBroadcast(SubLayerPolicy):
    """Keeps the output of every attention and reuses it (PAB, arXiv 2408.12588).

    Attention is computed at the steps 0, N, 2N, ... and at every step whose start time lies outside
    the window; at the others the kept output [B, N, C] is added through the current gate. MLPs are
    computed, but for those of a broadcast: with ``mlp_times`` given, the first step that starts at
    or below each of these times keeps the outputs of the MLPs of ``mlp_blocks``, and the
    ``mlp_skip`` steps after it reuse them. Every decision follows from the schedule alone.

    Args:
        interval: N, one attention in so many steps.
        window: start times (low, high) between which attention may be reused, both excluded. The
            paper's windows are on a scale of 1000.
        mlp_times: times at which MLP broadcasts begin; none for no broadcast of MLPs.
        mlp_blocks: the blocks whose MLPs are broadcast.
        mlp_skip: steps that one MLP broadcast reaches.

    Raises:
        UserError: an interval below 2, a window that is not 0 <= low < high <= 1, half of the
            settings of an MLP broadcast, or a time of one outside [0, 1]; at reset, a window
            without a step to skip, a block that the host lacks, or a broadcast that reaches no
            step.
    """

    name = "pab"
    parts = ("attention",)

    def __init__(
        self,
        interval: int,
        *,
        window: tuple[float, float] = (0.0, 1.0),
        mlp_times: Sequence[float] = (),
        mlp_blocks: Sequence[int] = (),
        mlp_skip: int = 2,
    ) -> None:
        self.interval = Interval(self.name, interval)
        low, high = window
        if not 0 <= low < high <= 1:
            raise UserError(
                f"policy 'pab': a window is two times with 0 <= low < high <= 1, got {list(window)}"
                "; the paper's [100, 850] of 1000 is window=[0.1,0.85]"
            )
        if bool(mlp_times) != bool(mlp_blocks):
            raise UserError(
                "policy 'pab': a broadcast of MLPs needs both mlp_times and mlp_blocks, got "
                f"mlp_times={list(mlp_times)} and mlp_blocks={list(mlp_blocks)}"
            )
        if not all(0 <= time <= 1 for time in mlp_times):
            raise UserError(
                f"policy 'pab': mlp_times are times from 0 to 1, got {list(mlp_times)}; the "
                "paper's 800 of 1000 is 0.8"
            )
        if mlp_skip < 1:
            raise UserError(f"policy 'pab': mlp_skip must be at least 1, got {mlp_skip}")
        self.window = (low, high)
        self.mlp_times, self.mlp_blocks = tuple(mlp_times), frozenset(mlp_blocks)
        self.mlp_skip = mlp_skip
        self._reused: frozenset[int] = frozenset()
        self._sources: frozenset[int] = frozenset()
        self._targets: frozenset[int] = frozenset()

    def prepare(self) -> tuple[str, ...]:
        """Lay out the run: which steps reuse attention and which reuse MLPs."""
        hooked = super().prepare()
        low, high = self.window
        self._reused = frozenset(
            index
            for index, time in enumerate(self.schedule[:-1])
            if not self.interval.full(index) and low < time < high
        )
        if not self._reused:
            raise UserError(
                f"policy 'pab': no step can be skipped: of the {self.steps} steps none starts "
                f"between t = {low:g} and {high:g} and is not a multiple of "
                f"{self.interval.interval}; widen the window or take more steps"
            )
        outside = sorted(i for i in self.mlp_blocks if not 0 <= i < len(self.host.blocks))
        if outside:
            raise UserError(
                f"policy 'pab': mlp_blocks names block {outside[0]}, but the host has blocks 0 to "
                f"{len(self.host.blocks) - 1}"
            )
        self._sources = frozenset(self._source(time) for time in self.mlp_times)
        reached = {
            source + i for source in self._sources for i in range(1, self.mlp_skip + 1)
        } - self._sources
        self._targets = frozenset(index for index in reached if index < self.steps)
        return hooked + tuple(f"block {i}: mlp" for i in sorted(self.mlp_blocks))

    def _source(self, time: float) -> int:
        """Return the first step that starts at or below ``time`` and has a step after it."""
        for index, start in enumerate(self.schedule[:-2]):
            if start <= time + 1e-6:  # schedules are float32: 0.8 comes as 0.80000001
                return index
        raise UserError(
            f"policy 'pab': an MLP broadcast at t = {time:g} reaches no step: the last step that "
            f"has another after it starts at t = {self.schedule[max(0, self.steps - 2)]:g}"
        )

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute where nothing is reused."""
        return step.index not in self._reused | self._targets

    def compute(self, step: StepInput, state: State) -> State:
        """Run every sub-layer and keep what later steps reuse."""
        return self._broadcast(step, state)

    def skip(self, step: StepInput, state: State) -> State:
        """Reuse attention, MLPs or both, and compute the others."""
        return self._broadcast(step, state)

    def _broadcast(self, step: StepInput, state: State) -> State:
        """Add kept outputs where this step reuses them; compute and keep the others."""
        attention, mlp = step.index in self._reused, step.index in self._targets

        def update(at: tuple[int, str], compute: Callable[[], Tensor]) -> Tensor:
            block, part = at
            if part == "attention":
                reused, kept = attention, True
            else:
                reused = mlp and block in self.mlp_blocks
                kept = step.index in self._sources and block in self.mlp_blocks
            if reused:
                return self.store[at]
            tensor = compute()
            if kept:
                self.store[at] = tensor
            return tensor

        state = self.walk(state, update)
        if mlp and step.index + 1 not in self._targets:
            for block in self.mlp_blocks:  # the broadcast ends here
                del self.store[block, "mlp"]
        return state
