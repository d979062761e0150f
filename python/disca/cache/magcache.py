# SPDX-License-Identifier: Apache-2.0
"""MagCache: skip while the residual of the blocks is known to change its length little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disca.cache.calibration import CALIBRATED, observe
from disca.cache.residual import ResidualPolicy
from disca.errors import UserError

if TYPE_CHECKING:
    from disca.cache.calibration import Batches, Calibration
    from disca.cache.policy import StepInput
    from disca.models.host import Host
    from disca.models.state import State

__all__ = ["MagCache"]


class MagCache(ResidualPolicy):
    """Skips the blocks by a list of ratios measured once (MagCache, arXiv 2506.09045).

    With ``residual_i`` what the blocks add to the video tokens at step i, calibration measures
    ``g_i = mean over tokens of |residual_i| / |residual_{i-1}|`` (lengths over channels). From the
    last full step on, a run keeps ``G = product of g``, ``E = sum of |1 - G|`` and the number n of
    steps. The step is skipped while E is at most ``threshold`` and n at most ``max_skip``;
    otherwise it is computed and all three start anew. The first ``int(retention * steps)`` steps
    are computed. A skipped step adds the last full step's residual to the video tokens.

    Nothing in the rule depends on the sample: which steps are skipped is known before the run.

    Args:
        threshold: the largest E of a skipped step.
        max_skip: the most steps skipped in a row (K).
        retention: share of the steps, at the start, that is computed.
        ratios: g of every step, the first of them unused; ``"calibrated"`` for the measured ones.
        calibration: the measurement, for ``"calibrated"``.

    Raises:
        UserError: a setting out of range or an unknown name of ratios.
    """

    name = "magcache"
    explicit = "ratios"

    def __init__(
        self,
        threshold: float,
        *,
        max_skip: int = 4,
        retention: float = 0.2,
        ratios: str | Sequence[float] = CALIBRATED,
        calibration: Calibration | None = None,
    ) -> None:
        if not threshold > 0 or max_skip < 1:
            raise UserError(
                "policy 'magcache' skips nothing with threshold "
                f"{threshold:g} and max_skip {max_skip}; use a threshold above 0, such as 0.12, "
                "and a max_skip of at least 1"
            )
        if not 0 <= retention < 1:
            raise UserError(
                f"policy 'magcache': retention is a share of the steps from 0 to below 1, got "
                f"{retention:g}"
            )
        if isinstance(ratios, str) and ratios != CALIBRATED:
            raise UserError(
                f"policy 'magcache': ratios are {CALIBRATED!r} or a list of one number a step, "
                f"got {ratios!r}"
            )
        if not isinstance(ratios, str) and not all(0 < ratio < float("inf") for ratio in ratios):
            raise UserError(
                f"policy 'magcache': ratios of lengths are numbers above 0, got {list(ratios)}"
            )
        self.threshold = threshold
        self.max_skip = max_skip
        self.retention = retention
        self.ratios = ratios
        self.calibration = calibration
        self.full: frozenset[int] = frozenset()

    def prepare(self) -> tuple[str, ...]:
        """Decide all steps and check that one of them is skipped."""
        ratios = self.fitted()["ratios"].tolist() if self.ratios == CALIBRATED else self.ratios
        if len(ratios) != self.steps:
            raise UserError(
                f"policy 'magcache': {len(ratios)} ratios were given and the run has {self.steps} "
                "steps; give one a step"
            )
        self.full = self._plan([float(ratio) for ratio in ratios])
        if len(self.full) == self.steps:
            raise UserError(
                f"policy 'magcache': with threshold {self.threshold:g} and retention "
                f"{self.retention:g} none of the {self.steps} steps is skipped; raise the "
                "threshold or lower the retention"
            )
        return ("video tokens after the blocks",)

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute at the steps decided before the run."""
        return step.index in self.full

    def _plan(self, ratios: Sequence[float]) -> frozenset[int]:
        """Return the steps that are computed."""
        retained = max(1, int(self.retention * len(ratios)))
        full = set(range(min(retained, len(ratios))))
        product, error, skipped = 1.0, 0.0, 0
        for index in range(retained, len(ratios)):
            product *= ratios[index]
            error += abs(1 - product)
            skipped += 1
            if error > self.threshold or skipped > self.max_skip:
                full.add(index)
                product, error, skipped = 1.0, 0.0, 0
        return frozenset(full)

    @classmethod
    def fit(cls, host: Host, schedule: Sequence[float], batches: Batches) -> dict[str, Tensor]:
        """Measure the ratios.

        Args:
            host: the network.
            schedule: times [steps + 1].
            batches: noise [B, C, F, H, W] and condition of each run.

        Returns:
            ``ratios`` [steps], the first of them 1, and ``spread`` [steps], the standard deviation
            over clips and tokens; float64.

        Raises:
            UserError: fewer than 2 steps, or blocks that add nothing to a token.
        """
        steps = len(schedule) - 1
        if steps < 2:
            raise UserError(
                f"policy 'magcache' compares neighbouring steps and a run of {steps} has none; "
                "calibrate with at least 2 steps"
            )
        found: list[list[Tensor]] = [[] for _ in range(steps)]
        last: Tensor | None = None
        for index, before, after in observe(host, schedule, batches):
            length = (after.video - before.video).double().norm(dim=-1)  # [B, n_video]
            if index and last is not None:
                found[index].append((length / last).flatten())
            last = length
        ratios, spread = torch.ones(steps, dtype=torch.float64), torch.zeros(steps).double()
        for index in range(1, steps):
            values = torch.cat(found[index])
            ratios[index], spread[index] = values.mean(), values.std(correction=0)
        if not ratios.isfinite().all():
            raise UserError(
                "policy 'magcache': the blocks of the host add nothing to some tokens, so their "
                "residuals have no ratio; train the model first"
            )
        return {"ratios": ratios, "spread": spread}

    @classmethod
    def summary(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say the ratios and how much they differ over clips and tokens."""
        ratios, spread = tensors["ratios"], tensors["spread"]
        return [
            f"ratios: [{', '.join(f'{value:.4f}' for value in ratios.tolist())}]",
            f"standard deviation over clips and tokens: mean {float(spread[1:].mean()):.3g}, "
            f"largest {float(spread[1:].max()):.3g} at step {int(spread.argmax())}",
        ]
