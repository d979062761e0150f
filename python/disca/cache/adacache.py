# SPDX-License-Identifier: Apache-2.0
"""AdaCache: the change of an attention output decides how many steps the next reuse lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from disca.cache.policy import SubLayerPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import StepInput
    from disca.models.state import State

__all__ = ["CODEBOOKS", "AdaCache"]

CODEBOOKS: dict[str, dict[float, int]] = {
    "fast100": {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3},
    "fast30": {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.0: 1},
    "slow30": {0.08: 3, 0.16: 2, 1.0: 1},
}
"""The paper's tables for Open-Sora, by speed and number of steps: change below -> steps on."""

_NEUTRAL = 1.0
"""The motion score that leaves the change as it is."""


class AdaCache(SubLayerPolicy):
    """Reuses attention and MLP outputs for as long as their change allows (arXiv 2411.02397).

    At a computed step the outputs ``p`` of all sub-layers [B, N, C] are kept. In the voting blocks
    they are compared, over the video tokens of the whole batch, with those ``p'`` of the computed
    step k steps before:

        c = ‖p − p'‖₁ / ‖p'‖₁ / k

    averaged over the voting blocks. The codebook turns c into the distance to the next computed
    step: the value of the first key above c, or the last value. All blocks and sub-layers share it.
    The steps between add the kept outputs through the current gates. The first two and the last two
    steps are always computed.

    Motion regularisation multiplies c by ``m + |g|``: where much moves, reuse gets shorter.

        m = (q / scale) ** power     q = ‖p[s:] − p[:−s]‖₁ / (‖p[s:]‖₁ + ‖p[:−s]‖₁)
        g = gradient · (m − m') / k

    with p cut along the frames, q averaged over the strides s and voting blocks, and m' that of the
    last computed step. Outside the window m is 1.

    Args:
        codebook: a name in :data:`CODEBOOKS`, or a mapping of changes above 0, in increasing order,
            to their steps.
        vote: the blocks that are compared; empty for the middle one.
        part: the sub-layer that is compared.
        motion: regularise by motion.
        motion_scale: the q at which m is 1.
        motion_power: how sharply m grows with q.
        motion_strides: distances s, in frames of tokens.
        motion_window: first and last fraction of the run with regularisation.
        gradient: weight of the change of m.

    Raises:
        UserError: an unknown, empty, unordered or never-skipping codebook, a motion setting out of
            range; at reset, a voting block that the host lacks, or fewer than 5 steps; at the first
            step, a clip with too few frames for a stride.
    """

    name = "adacache"

    def __init__(
        self,
        codebook: Any = "fast30",
        *,
        vote: Sequence[int] = (),
        part: Literal["attention", "mlp"] = "attention",
        motion: bool = False,
        motion_scale: float = 0.385,
        motion_power: float = 8.0,
        motion_strides: Sequence[int] = (1,),
        motion_window: tuple[float, float] = (0.1, 0.9),
        gradient: float = 10.0,
    ) -> None:
        self.codebook = _codebook(codebook)
        self.vote, self.part, self.motion = tuple(vote), part, motion
        if not (0 < motion_scale < inf and 0 < motion_power < inf and 0 <= gradient < inf):
            raise UserError(
                "policy 'adacache': motion_scale and motion_power must be above 0, gradient at "
                f"least 0 and all three finite, got {motion_scale:g}, {motion_power:g} and "
                f"{gradient:g}"
            )
        if not motion_strides or min(motion_strides) < 1:
            raise UserError(
                "policy 'adacache': motion_strides are distances of 1 frame or more, got "
                f"{list(motion_strides)}"
            )
        if not 0 <= motion_window[0] <= motion_window[1] <= 1:
            raise UserError(
                "policy 'adacache': motion_window is two fractions of the run with "
                f"0 <= first <= last <= 1, got {list(motion_window)}"
            )
        self.motion_scale, self.motion_power = motion_scale, motion_power
        self.motion_strides, self.motion_window = tuple(motion_strides), motion_window
        self.gradient = gradient
        self._voters: frozenset[tuple[int, str]] = frozenset()
        self._next, self._last, self._motion = 0, 0, _NEUTRAL

    def prepare(self) -> tuple[str, ...]:
        """Check the voting blocks and the number of steps, and forget the last run."""
        hooked = super().prepare()
        total = len(self.host.blocks)
        vote = self.vote or ((total - 1) // 2,)
        outside = [i for i in vote if not 0 <= i < total]
        if outside:
            raise UserError(
                f"policy 'adacache': vote names block {outside[0]}, but the host has blocks 0 to "
                f"{total - 1}"
            )
        if self.steps < 5:
            raise UserError(
                "policy 'adacache' computes the first two and the last two steps, so of "
                f"{self.steps} steps it would skip none; take 5 or more"
            )
        self._voters = frozenset((i, self.part) for i in vote)
        self._next, self._last, self._motion = 0, 0, _NEUTRAL
        return hooked

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute at the step that the codebook named, and at both ends of the run."""
        return step.index == self._next or step.index >= self.steps - 2

    def compute(self, step: StepInput, state: State) -> State:
        """Run and keep every sub-layer, and look up how far the next computed step is."""
        changes: list[float] = []
        motions: list[float] = []
        moving = self.motion and self._in_window(step.index)

        def keep(at: tuple[int, str], compute: Callable[[], Tensor]) -> Tensor:
            output = compute()
            if at in self._voters:
                video = output[:, : state.n_video]
                if self.motion:
                    self._check_frames(state.grid[0])
                if at in self.store:
                    kept = self.store[at][:, : state.n_video].float()
                    changes.append(float((video - kept).abs().sum() / kept.abs().sum()))
                    if moving:
                        motions.append(self._movement(video, state.grid[0]))
            self.store[at] = output
            return output

        after = self.walk(state, keep)
        if changes:
            change = sum(changes) / len(changes) / (step.index - self._last)
            self._next = step.index + self._distance(change, motions, step.index - self._last)
        else:
            self._next = step.index + 1  # nothing to compare with yet
        self._last = step.index
        return after

    def skip(self, step: StepInput, state: State) -> State:
        """Add the kept outputs through the current gates."""
        return self.walk(state, lambda at, compute: self.store[at])

    def _distance(self, change: float, motions: list[float], since: int) -> int:
        """Return the number of steps to the next computed one."""
        if self.motion:
            score = sum(motions) / len(motions) if motions else None
            motion = _NEUTRAL if score is None else (score / self.motion_scale) ** self.motion_power
            change *= motion + abs(self.gradient * (motion - self._motion) / since)
            self._motion = motion
        for key, steps in self.codebook:
            if change < key:
                return steps
        return self.codebook[-1][1]

    def _in_window(self, index: int) -> bool:
        """Return whether motion counts at this step; steps are counted from 1 as in the paper."""
        first, last = self.motion_window
        return first * self.steps <= index + 1 <= last * self.steps

    def _movement(self, video: Tensor, frames: int) -> float:
        """Return q: how much of an output [B, n, C] changes from frame to frame, 0 to 1."""
        tokens = video.float().reshape(len(video), frames, -1, video.shape[-1])
        total = 0.0
        for stride in self.motion_strides:
            later, earlier = tokens[:, stride:], tokens[:, :-stride]
            size = later.abs().sum() + earlier.abs().sum()
            total += float((later - earlier).abs().sum() / size)
        return total / len(self.motion_strides)

    def _check_frames(self, frames: int) -> None:
        if frames <= max(self.motion_strides):
            raise UserError(
                f"policy 'adacache': motion over {max(self.motion_strides)} frames of tokens needs "
                f"a clip of more, this one has {frames}; lower motion_strides or use motion=false"
            )


def _codebook(given: Any) -> tuple[tuple[float, int], ...]:
    """Return a codebook as pairs of change and steps, checked."""
    if isinstance(given, str):
        if given not in CODEBOOKS:
            raise UserError(
                f"policy 'adacache': no codebook {given!r}; there are: {', '.join(CODEBOOKS)}, or "
                "write one such as codebook={0.1: 4, 0.3: 2, 1.0: 1}"
            )
        given = CODEBOOKS[given]
    wrong = UserError(
        "policy 'adacache': a codebook is one of the names "
        f"{', '.join(CODEBOOKS)}, or maps changes above 0, in increasing order, to whole numbers "
        f"of steps from 1 on, such as {{0.1: 4, 0.3: 2, 1.0: 1}}; got {given!r}"
    )
    try:
        pairs = tuple(TypeAdapter(dict[float, int]).validate_python(given).items())
    except ValidationError:
        raise wrong from None
    keys = [key for key, _ in pairs]
    rising = all(low < high for low, high in pairwise([0.0, *keys]))
    if not pairs or not rising or min(steps for _, steps in pairs) < 1:
        raise wrong
    if max(steps for _, steps in pairs) < 2:
        raise UserError(
            f"policy 'adacache': the codebook {dict(pairs)} computes every step and skips none; "
            "give a change that reuse lasts 2 steps or more for"
        )
    return pairs
