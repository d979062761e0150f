# SPDX-License-Identifier: Apache-2.0
"""The rule that most training-free caches share: a few full steps, then one every N."""

from __future__ import annotations

from disca.errors import UserError

__all__ = ["Interval"]


class Interval:
    """The first ``first`` steps are full, then one after every ``interval - 1`` others.

    With ``first = 1`` these are 0, N, 2N, ...; with ``first = 4`` and N = 6 they are 0 to 3, 9, 15,
    ... (TaylorSeer's ``first_enhance``).

    Args:
        policy: name of the policy, for messages.
        interval: N.
        first: full steps at the start, at least 1.

    Raises:
        UserError: an interval below 2, which can never skip, or ``first`` below 1.
    """

    def __init__(self, policy: str, interval: int, first: int = 1) -> None:
        if interval < 2:
            raise UserError(
                f"policy {policy!r}: an interval of {interval} computes every step and skips none; "
                "use 2 or more, or the policy 'none'"
            )
        if first < 1:
            raise UserError(
                f"policy {policy!r}: at least the first step is full, got first={first}"
            )
        self.policy, self.interval, self.first = policy, interval, first

    def check(self, steps: int) -> None:
        """Raise UserError if all of ``steps`` steps would be full."""
        if self.first >= steps:
            raise UserError(
                f"policy {self.policy!r}: the first {self.first} steps are full and the run has "
                f"{steps}, so nothing would be skipped; lower first or take more steps"
            )

    def full(self, index: int) -> bool:
        """Return whether step ``index``, counted from 0, is full."""
        return index < self.first or (index - self.first + 1) % self.interval == 0

    def since(self, index: int) -> int:
        """Return how many steps ago the last full step up to ``index`` was."""
        return 0 if index < self.first else (index - self.first + 1) % self.interval
