# SPDX-License-Identifier: Apache-2.0
"""What every cache policy offers, and the part that one-tensor policies share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.models.condition import Condition
    from disca.models.host import Host
    from disca.models.state import State

    WholeStep = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
    """(x, t, r, cond) -> the sample at r."""

__all__ = ["CacheReport", "Decision", "OneTensorCache", "Policy"]


class Decision(str, Enum):
    """What a policy wants of one step."""

    COMPUTE = "compute"
    SKIP = "skip"


@dataclass(frozen=True)
class CacheReport:
    """What a policy did in one run.

    Attributes:
        policy: name of the policy.
        hooked: the parts of the host that the policy reads or replaces.
        computed: steps that ran every block of the host.
        skipped: steps that did not.
        cache_bytes: the most memory that the cache held at once.
    """

    policy: str
    hooked: tuple[str, ...]
    computed: int
    skipped: int
    cache_bytes: int


class Policy(Protocol):
    """Decides, step by step, whether a host computes or replays, and keeps what replaying needs.

    A policy is written once, against :class:`disca.models.host.Host`, and knows no model. A
    sampler asks :meth:`whole_step` first; without one it embeds the step's input, asks
    :meth:`step`, calls :meth:`compute` or :meth:`skip` for the tokens before the head, and applies
    the host's own head.
    """

    name: str
    idle_ok: bool
    """Whether a run in which no step is skipped is what the caller wants."""

    def reset(self, host: Host, steps: int) -> None:
        """Forget the last run and get ready for ``steps`` steps of ``host``.

        Raises:
            UserError: the policy has nothing to work on in this host or can never skip.
        """

    def whole_step(self, index: int) -> WholeStep | None:
        """Return what replaces all of step ``index``, embedders and head included.

        For a step that is skipped whatever its input is; None if the input has to be seen first.
        """

    def step(self, index: int, state: State) -> Decision:
        """Decide what step ``index`` does, given its embedded input."""

    def compute(self, host: Host, state: State) -> State:
        """Run the host's blocks and keep what later steps need."""

    def skip(self, host: Host, state: State) -> State:
        """Return the state before the head without running the host's blocks."""

    def report(self) -> CacheReport:
        """Tell what was hooked, computed and skipped since :meth:`reset`."""


class OneTensorCache:
    """Base of the policies that keep one tensor: the tokens before the head at the last full step.

    The cache is written at full steps only. What :meth:`replay` returns never enters it, so an
    error of a skipped step reaches later steps through the sample alone (DisCa, Eq. 5).

    Args:
        full_steps: the steps, counted from 0, that run the whole host; step 0 among them.
            :func:`disca.sample.resolve_full_steps` makes them from a name.
        allow_idle: accept a list in which every step is full.
    """

    name = "one-tensor"

    def __init__(self, full_steps: Sequence[int], *, allow_idle: bool = False) -> None:
        self.full_steps = frozenset(full_steps)
        self.idle_ok = allow_idle
        self.cache: Tensor | None = None
        self._computed = self._skipped = self._peak_bytes = 0

    def reset(self, host: Host, steps: int) -> None:
        """Forget the last run and check that the full steps fit ``steps`` steps.

        Raises:
            UserError: full steps that do not fit ``steps`` or leave no step to skip.
        """
        if 0 not in self.full_steps or not self.full_steps <= set(range(steps)):
            raise UserError(
                f"policy {self.name!r} needs full steps from 0 to {steps - 1} with step 0 among "
                f"them, got {sorted(self.full_steps)}"
            )
        if len(self.full_steps) == steps and not self.idle_ok:
            raise UserError(
                f"policy {self.name!r} would skip nothing: all {steps} steps are full; "
                "leave some out or use the policy 'none'"
            )
        self.cache = None
        self._computed = self._skipped = self._peak_bytes = 0

    def whole_step(self, index: int) -> WholeStep | None:
        """Leave every step to the host's embedders and head."""
        return None

    def step(self, index: int, state: State) -> Decision:
        """Compute at the listed steps, skip at the others."""
        return Decision.COMPUTE if index in self.full_steps else Decision.SKIP

    def compute(self, host: Host, state: State) -> State:
        """Run every block and keep the tokens, detached."""
        state = host.run(state)
        self.cache = state.tokens.detach()
        self._computed += 1
        self._peak_bytes = max(self._peak_bytes, self.cache.numel() * self.cache.element_size())
        return state

    def skip(self, host: Host, state: State) -> State:
        """Put the replayed tokens into the state and leave the cache as it is."""
        return state.with_tokens(self.replay(state, self.skipping()))

    def skipping(self) -> Tensor:
        """Count a skipped step and return the cache that it reads."""
        if self.cache is None:
            raise UserError(f"policy {self.name!r} has to compute a step before it can skip one")
        self._skipped += 1
        return self.cache

    def replay(self, state: State, cache: Tensor) -> Tensor:
        """Return the tokens [B, N, C] of a skipped step from its input and the cache."""
        raise NotImplementedError

    def report(self) -> CacheReport:
        """Tell what was computed and skipped since :meth:`reset`."""
        return CacheReport(
            self.name, ("tokens before the head",), self._computed, self._skipped, self._peak_bytes
        )
