# SPDX-License-Identifier: Apache-2.0
"""What a cache policy, a predictor and a discriminator need of a video model."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from disca.models.condition import Condition
from disca.models.state import State

__all__ = ["Block", "Host", "ModulatedBlock"]


@runtime_checkable
class Block(Protocol):
    """One transformer block and its two sub-layers.

    `attention` and `mlp` return what the sub-layer adds before its gate, for video and text tokens
    joined [B, N, C]; `combine` adds such tensors through the gates of the current state. A policy
    that reuses a sub-layer keeps its output and calls `combine` with it instead of computing it
    again. In a parallel block, such as a single-stream one, both sub-layers read the block's input;
    in any other `mlp` reads the state after attention.
    """

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same state."""

    def __call__(self, state: State) -> State:
        """Run the whole block."""

    def attention(self, state: State) -> Tensor:
        """Return attention's update before the gate."""

    def mlp(self, state: State) -> Tensor:
        """Return the MLP's update before the gate."""

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        """Add sub-layer outputs through the current gates."""


@runtime_checkable
class ModulatedBlock(Protocol):
    """A block whose modulated input can be read without running the block.

    Its change from step to step foretells that of the output (TeaCache, arXiv 2411.19108).
    """

    def modulated(self, state: State) -> Tensor:
        """Return the video tokens after the first norm, shift and scale [B, n_video, C]."""


@runtime_checkable
class Host(Protocol):
    """A video model taken apart into embedders, blocks and head.

    The velocity is `head(run(embed(x, t, r, cond)))`. A policy may stop after any block, keep
    tokens, replace them with `State.with_tokens` and go on.
    """

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order, double-stream first; each is a `Block`."""

    @property
    def mean_flow(self) -> bool:
        """Whether `embed` takes an end time r, which makes the output an average velocity."""

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None,
        cond: Condition,
        *,
        tangent_width: float | Tensor | None = None,
    ) -> State:
        """Turn a latent [B, C, F, H, W], times [B] and a condition into the first state."""

    def run(self, state: State, start: int = 0, stop: int | None = None) -> State:
        """Run blocks `start` to `stop` (exclusive; None for all that follow)."""

    def head(self, state: State) -> Tensor:
        """Turn the state's video tokens into a velocity [B, C, F, H, W]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""
