# SPDX-License-Identifier: Apache-2.0
"""No cache: every step runs the whole host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.policy import CacheReport, Decision

if TYPE_CHECKING:
    from disca.models.host import Host
    from disca.models.state import State

__all__ = ["NoCache"]


class NoCache:
    """Computes every step; the uncached run that the other policies are compared with."""

    name = "none"
    idle_ok = True

    def __init__(self) -> None:
        self._computed = 0

    def reset(self, host: Host, steps: int) -> None:
        """Start counting anew."""
        self._computed = 0

    def whole_step(self, index: int) -> None:
        """Leave every step to the host."""

    def step(self, index: int, state: State) -> Decision:
        """Always compute."""
        return Decision.COMPUTE

    def compute(self, host: Host, state: State) -> State:
        """Run every block."""
        self._computed += 1
        return host.run(state)

    def skip(self, host: Host, state: State) -> State:
        """Never called: no step is skipped."""
        raise RuntimeError("the policy 'none' skips no step")

    def report(self) -> CacheReport:
        """Tell how many steps were computed."""
        return CacheReport(self.name, (), self._computed, 0, 0)
