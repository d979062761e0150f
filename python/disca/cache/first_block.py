# SPDX-License-Identifier: Apache-2.0
"""First-block cache: the first block runs at every step and tells whether the others must."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disca.cache.policy import TokenPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["FirstBlockCache"]


class FirstBlockCache(TokenPolicy):
    """Skips all blocks but the first while the first one's residual hardly changes.

    With ``e`` the embedded tokens and ``b`` the tokens after the first block, let ``r = b - e`` for
    the video tokens [B, n, C]. A step is skipped if

        mean|r - r'| / mean|r'| < threshold,

    where r' is that of the last computed step and the means run over the batch, so that there is
    one decision for all samples. A skipped step returns ``b + d``, where ``d`` [B, N, C] is what
    the other blocks added to all tokens at the last computed step. No step but the first is forced.
    The method is ParaAttention's first-block cache, which has no paper of its own: TeaCache's test
    (arXiv 2411.19108) on the first block's output, without accumulation and without a fit.

    Args:
        threshold: relative change below which a step is skipped.

    Raises:
        UserError: a threshold that is not above 0; at reset, a host of fewer than two blocks.
    """

    name = "first-block"

    def __init__(self, threshold: float) -> None:
        if not threshold > 0:
            raise UserError(
                f"policy 'first-block': no change is below a threshold of {threshold:g}, so none "
                "of the steps would be skipped; use a positive one such as 0.06"
            )
        self.threshold = threshold
        self._first: State | None = None

    def prepare(self) -> tuple[str, ...]:
        """Check that there is a block beside the first."""
        self._first = None
        total = len(self.host.blocks)
        if total < 2:
            raise UserError(
                "policy 'first-block' replaces the blocks after the first, but the host has "
                f"{total} in all; use a policy that replaces the whole stack, such as 'reuse'"
            )
        return ("block 0: residual of the video tokens", f"blocks 1 to {total - 1}: residual")

    def computes(self, step: StepInput, state: State) -> bool:
        """Run the first block and compare its residual with the last computed step's."""
        self._first = self.host.run(state, 0, 1)
        if "first" not in self.store:
            return True
        kept = self.store["first"].float()
        change = (self._first.video - state.video - kept).abs().mean() / kept.abs().mean()
        return not float(change) < self.threshold

    def compute(self, step: StepInput, state: State) -> State:
        """Run the other blocks and keep both residuals."""
        first = self._take_first()
        self.store["first"] = first.video - state.video
        state = self.host.run(first, 1)
        self.store["rest"] = state.tokens - first.tokens
        return state

    def skip(self, step: StepInput, state: State) -> State:
        """Add what the other blocks added last."""
        first = self._take_first()
        return first.with_tokens(first.tokens + self.store["rest"])

    def _take_first(self) -> State:
        """Return the state after the first block and let go of it: it belongs to one step."""
        first, self._first = self._first, None
        assert first is not None
        return first
