# SPDX-License-Identifier: Apache-2.0
"""No cache: every step runs the whole host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.policy import OutputPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput

__all__ = ["NoCache"]


class NoCache(OutputPolicy):
    """Computes every step; the uncached run that the other policies are compared with."""

    name = "none"
    idle_ok = True

    def prepare(self) -> tuple[str, ...]:
        """Hook nothing."""
        return ()

    def computes(self, step: StepInput) -> bool:
        """Always compute."""
        return True

    def compute(self, step: StepInput) -> Tensor:
        """Run the host."""
        return self.evaluate(step)

    def skip(self, step: StepInput) -> Tensor:
        """Never called: no step is skipped."""
        raise RuntimeError("the policy 'none' skips no step")
