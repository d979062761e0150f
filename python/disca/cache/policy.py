# SPDX-License-Identifier: Apache-2.0
"""What every cache policy offers, and the bases that they are built on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from disca.cache.steps import resolve_full_steps
from disca.cache.store import Store
from disca.errors import UserError
from disca.models.host import Block
from disca_kernels import mean_velocity_step

if TYPE_CHECKING:
    from disca.cache.calibration import Calibration
    from disca.models.condition import Condition
    from disca.models.host import Host
    from disca.models.state import State

__all__ = [
    "CachePolicy",
    "CacheReport",
    "OutputPolicy",
    "Policy",
    "Resources",
    "StepInput",
    "StepOutput",
    "SubLayerPolicy",
    "TokenPolicy",
]


@dataclass(frozen=True)
class StepInput:
    """One step of a sampler, before it is taken.

    Attributes:
        index: the step, counted from 0.
        x: the sample at t [B, C, F, H, W].
        t: start of the step [B].
        r: end of the step [B].
        cond: the condition, batch B.
    """

    index: int
    x: Tensor
    t: Tensor
    r: Tensor
    cond: Condition


@dataclass(frozen=True)
class StepOutput:
    """One step of a sampler, taken.

    Attributes:
        x: the sample at r [B, C, F, H, W].
        full: whether the whole network ran.
    """

    x: Tensor
    full: bool


@dataclass(frozen=True)
class CacheReport:
    """What a policy did in one run.

    Attributes:
        policy: name of the policy.
        hooked: the parts of the host that the policy reads or replaces.
        computed: the steps, counted from 0, that ran the whole network.
        skipped: the steps that did not.
        cache_bytes: the most memory that the cache held between two steps.
    """

    policy: str
    hooked: tuple[str, ...]
    computed: tuple[int, ...]
    skipped: tuple[int, ...]
    cache_bytes: int


class Policy(Protocol):
    """Takes the steps of a sampler with a host, computing or replacing parts of it.

    A policy is written once, against :class:`disca.models.host.Host`, and knows no model. A sampler
    calls :meth:`reset`, then :meth:`advance` for each step in order, then :meth:`report`.
    """

    @property
    def name(self) -> str:
        """Name of the policy."""

    @property
    def idle_ok(self) -> bool:
        """Whether a run in which no step is skipped is what the caller wants."""

    def reset(self, host: Host, schedule: Sequence[float]) -> None:
        """Forget the last run and get ready for a run of ``host`` over ``schedule``.

        Args:
            host: the network.
            schedule: times [steps + 1], decreasing.

        Raises:
            UserError: the policy has nothing to work on in this host, or can never skip.
        """

    def advance(self, step: StepInput) -> StepOutput:
        """Take one step."""

    def report(self) -> CacheReport:
        """Tell what was hooked, computed, skipped and held since :meth:`reset`."""


@dataclass(frozen=True)
class Resources:
    """What the settings of a policy may name: networks, calibrations and the empty prompt.

    Attributes:
        predictors: predictors by name, called as ``predictor(state, cache)``; the first is taken
            where none is named.
        calibration: returns the calibration of a policy by the policy's name, or raises UserError.
        null: returns the empty condition of a batch size.
        guidance: guidance scale of a two-pass model.
    """

    predictors: Mapping[str, Callable[[State, Tensor], Tensor]]
    calibration: Callable[[str], Calibration]
    null: Callable[[int], Condition]
    guidance: float


class CachePolicy(ABC):
    """Base of all policies: counts steps, holds the cache, and checks the settings at reset.

    A subclass sets ``name``, implements :meth:`prepare` and :meth:`advance`, keeps every cached
    tensor in ``self.store`` and ends each step with :meth:`finish`.

    Attributes:
        name: the policy's name in tables and settings.
        idle_ok: whether a run that skips nothing is meant.
        calibrated: whether :func:`disca.cache.calibration.calibrate` has to run before.
        host: the network of this run.
        schedule: the times of this run, steps + 1 of them.
        store: every tensor that the policy keeps from one step to a later one.
    """

    name: ClassVar[str]
    idle_ok: bool = False
    calibrated: ClassVar[bool] = False

    host: Host
    schedule: tuple[float, ...]
    store: Store

    @classmethod
    def from_settings(cls, resources: Resources, **settings: Any) -> CachePolicy:
        """Build the policy from the settings of a comparison; see :mod:`disca.cache.registry`.

        A policy that needs networks or calibrations overrides this and takes them of ``resources``.
        """
        return cls(**settings)

    def reset(self, host: Host, schedule: Sequence[float]) -> None:
        """Forget the last run and check the settings against ``host`` and ``schedule``."""
        self.host = host
        self.schedule = tuple(float(time) for time in schedule)
        self.store = Store()
        self._computed: list[int] = []
        self._skipped: list[int] = []
        self._hooked = self.prepare()

    @property
    def steps(self) -> int:
        """Number of steps of this run."""
        return len(self.schedule) - 1

    @abstractmethod
    def prepare(self) -> tuple[str, ...]:
        """Check the settings against host and schedule and return the parts of the host used.

        Raises:
            UserError: the host lacks what the policy needs, or the settings can never skip.
        """

    @abstractmethod
    def advance(self, step: StepInput) -> StepOutput:
        """Take one step."""

    def finish(self, step: StepInput, x: Tensor, *, full: bool) -> StepOutput:
        """Count a step that reached ``x`` and measure the cache."""
        (self._computed if full else self._skipped).append(step.index)
        self.store.measure()
        return StepOutput(x, full)

    def report(self) -> CacheReport:
        """Tell what was hooked, computed, skipped and held since :meth:`reset`."""
        return CacheReport(
            self.name, self._hooked, tuple(self._computed), tuple(self._skipped), self.store.peak
        )

    def full_steps(self, spec: str | Sequence[int]) -> frozenset[int]:
        """Return the full steps that ``spec`` names, of which at least one step is left out.

        Raises:
            UserError: a list that does not fit the run, or that skips nothing (unless idle_ok).
        """
        full = frozenset(resolve_full_steps(spec, self.steps))
        if len(full) == self.steps and not self.idle_ok:
            raise UserError(
                f"policy {self.name!r} would skip nothing: all {self.steps} steps are full; "
                "leave some out or use the policy 'none'"
            )
        return full


class TokenPolicy(CachePolicy):
    """Base of the policies that replace blocks: embedders and head run at every step."""

    def advance(self, step: StepInput) -> StepOutput:
        """Embed, run or replace the blocks, and apply the host's own head."""
        host = self.host
        state = host.embed(step.x, step.t, step.r if host.mean_flow else None, step.cond)
        full = self.computes(step, state) or not self._computed
        state = self.compute(step, state) if full else self.skip(step, state)
        x = mean_velocity_step(step.x, host.head(state), step.t, step.r)
        return self.finish(step, x, full=full)

    @abstractmethod
    def computes(self, step: StepInput, state: State) -> bool:
        """Decide whether the whole network runs, given the embedded input.

        Called once a step; the first step of a run is computed whatever this returns.
        """

    @abstractmethod
    def compute(self, step: StepInput, state: State) -> State:
        """Run the host's blocks, keep what later steps need, return the state before the head."""

    @abstractmethod
    def skip(self, step: StepInput, state: State) -> State:
        """Return the state before the head without running all of the host's blocks."""


class SubLayerPolicy(TokenPolicy):
    """Base of the policies that keep the outputs of sub-layers (attention, MLP) of every block."""

    def prepare(self) -> tuple[str, ...]:
        """Check that every block of the host has sub-layers; return their names."""
        blocks = self.host.blocks
        for i, block in enumerate(blocks):
            if not isinstance(block, Block):
                raise UserError(
                    f"policy {self.name!r} reuses the outputs of attention and MLP, but block {i} "
                    f"of the host ({type(block).__name__}) does not expose them: it needs "
                    "attention(state), mlp(state), combine(state, ...) and parallel; use a policy "
                    "that works on whole blocks or on the output, such as 'teacache' or 'easycache'"
                )
        if not len(blocks):
            raise UserError(f"policy {self.name!r} has nothing to hook: the host has no blocks")
        return tuple(f"block {i}: {part}" for i in range(len(blocks)) for part in self.parts)

    parts: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    """The sub-layers that the policy touches."""

    def walk(
        self, state: State, update: Callable[[tuple[int, str], Callable[[], Tensor]], Tensor]
    ) -> State:
        """Run all blocks sub-layer by sub-layer.

        Args:
            state: the state before the first block.
            update: called with (block, "attention" or "mlp") and a function that computes what this
                sub-layer adds before its gate [B, N, C]; returns what is to be added.

        Returns:
            The state after the last block.
        """
        for i, block in enumerate(self.host.blocks):
            assert isinstance(block, Block)
            attention = update((i, "attention"), partial(block.attention, state))
            if block.parallel:
                mlp = update((i, "mlp"), partial(block.mlp, state))
                state = block.combine(state, attention=attention, mlp=mlp)
            else:
                state = block.combine(state, attention=attention)
                mlp = update((i, "mlp"), partial(block.mlp, state))
                state = block.combine(state, mlp=mlp)
        return state


class OutputPolicy(CachePolicy):
    """Base of the policies that see only the host's input and output."""

    def prepare(self) -> tuple[str, ...]:
        """Return the one part: the output."""
        return ("velocity",)

    def advance(self, step: StepInput) -> StepOutput:
        """Run the whole host, or replace its output."""
        full = self.computes(step) or not self._computed
        velocity = self.compute(step) if full else self.skip(step)
        x = mean_velocity_step(step.x, velocity, step.t, step.r)
        return self.finish(step, x, full=full)

    def evaluate(self, step: StepInput) -> Tensor:
        """Return the host's velocity [B, C, F, H, W]."""
        host = self.host
        end = step.r if host.mean_flow else None
        return host.head(host.run(host.embed(step.x, step.t, end, step.cond)))

    @abstractmethod
    def computes(self, step: StepInput) -> bool:
        """Decide whether the host runs; the first step of a run is computed in any case."""

    @abstractmethod
    def compute(self, step: StepInput) -> Tensor:
        """Return :meth:`evaluate` of the step and keep what later steps need."""

    @abstractmethod
    def skip(self, step: StepInput) -> Tensor:
        """Return a velocity [B, C, F, H, W] without running the host."""
