# SPDX-License-Identifier: Apache-2.0
"""What TeaCache and MagCache share: the residual of all blocks stands in for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.calibration import CalibratedPolicy

if TYPE_CHECKING:
    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["ResidualPolicy"]


class ResidualPolicy(CalibratedPolicy):
    """Base of the calibrated policies that keep what all blocks add to the video tokens."""

    def compute(self, step: StepInput, state: State) -> State:
        """Run the blocks and keep what they add to the video tokens."""
        after = self.host.run(state)
        self.store["residual"] = after.video - state.video
        return after

    def skip(self, step: StepInput, state: State) -> State:
        """Add the kept residual to the video tokens; the text tokens stay, the head reads none."""
        return state.with_streams(state.video + self.store["residual"], state.text)
