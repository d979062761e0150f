# SPDX-License-Identifier: Apache-2.0
"""TeaCache: skip while the modulated input of the first block has changed little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from disca.cache.calibration import CALIBRATED, observe
from disca.cache.residual import ResidualPolicy
from disca.data.source import closest
from disca.errors import UserError
from disca.models.host import ModulatedBlock

if TYPE_CHECKING:
    from disca.cache.calibration import Batches, Calibration
    from disca.cache.policy import StepInput
    from disca.models.host import Host
    from disca.models.state import State

__all__ = ["PUBLISHED", "TeaCache"]

PUBLISHED: dict[str, tuple[float, ...]] = {
    "hunyuanvideo": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "cogvideox-2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "cogvideox-5b": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "mochi": (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
    "ltx": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    "cosmos": (2.71156237e02, -9.19775607e01, 2.2443725e00, 2.08355751e00, 1.4177963e-01),
    "latte": (-2.46434137e03, 3.08044764e02, 8.07447667e01, -4.11385132e00, 1.11001402e-01),
    "open-sora": (2.17546007e02, -1.18329252e02, 2.68662585e01, -4.59364272e-02, 4.84426240e-02),
    "open-sora-plan": (
        2.05943668e05,
        -1.48759286e04,
        3.06085986e02,
        1.31418080e00,
        2.39658469e-03,
    ),
    "lumina": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "hidream": (-3.13605009e04, -7.12425503e02, 4.91363285e01, 8.26515490e00, 1.08053901e-01),
}
"""Coefficients of the authors' code by model, highest power first.

They belong to those models and their step counts; on another model the threshold has no meaning
that carries over.
"""

_DEGREE = 4


class TeaCache(ResidualPolicy):
    """Skips the blocks while the rescaled change of their input adds up to little.

    With m the modulated input of the first block (video tokens), a step's change is
    ``d = mean|m - m_prev| / mean|m_prev|`` and the distance grows by p(d), a polynomial of degree
    4 that maps the change of the input to that of the output. The step is skipped while the sum is
    below the threshold; otherwise it is computed and the sum starts at 0. m_prev is that of the
    step before, skipped or not. First and last step are computed. A skipped step adds the last
    full step's residual of all blocks to the video tokens (TeaCache, arXiv 2411.19108).

    The means are taken over the whole batch, so one decision holds for all its clips.

    Args:
        threshold: the distance from which a step is computed.
        coefficients: of p, highest power first; ``"calibrated"``, or a name of
            :data:`PUBLISHED`. A calibrated p is evaluated within the changes that it was fitted on.
        calibration: the fit, for ``"calibrated"``.

    Raises:
        UserError: a threshold that is not above 0, no coefficients, one that is not finite, or an
            unknown name.
    """

    name = "teacache"
    explicit = "coefficients"

    def __init__(
        self,
        threshold: float,
        *,
        coefficients: str | Sequence[float] = CALIBRATED,
        calibration: Calibration | None = None,
    ) -> None:
        if not threshold > 0:
            raise UserError(
                f"policy 'teacache': the distance is never below a threshold of {threshold}, so "
                "nothing is skipped; use a number above 0, such as 0.15"
            )
        if not isinstance(coefficients, str) and not coefficients:
            raise UserError(
                "policy 'teacache': coefficients is an empty list; give those of a polynomial, "
                "highest power first, 'calibrated' or the name of a published set"
            )
        if not isinstance(coefficients, str) and not all(map(isfinite, coefficients)):
            raise UserError(
                "policy 'teacache': coefficients are finite numbers, highest power first, got "
                f"{list(coefficients)}"
            )
        known = [CALIBRATED, *PUBLISHED]
        if isinstance(coefficients, str) and coefficients not in known:
            raise UserError(
                f"policy 'teacache': no coefficients {coefficients!r}; there are: "
                f"{', '.join(known)}{closest(coefficients, known)}"
            )
        self.threshold = threshold
        self.coefficients = coefficients
        self.calibration = calibration
        self._polynomial: tuple[float, ...] = ()
        self._range = (float("-inf"), float("inf"))
        self._distance = 0.0

    def prepare(self) -> tuple[str, ...]:
        """Look the polynomial up and check that it and the schedule leave something to skip."""
        _first_block(self.host)
        if self.steps < 3:
            raise UserError(
                f"policy 'teacache' computes the first and the last step, and the run has "
                f"{self.steps}, so nothing would be skipped; take at least 3 steps"
            )
        self._distance = 0.0
        if self.coefficients == CALIBRATED:
            tensors = self.fitted()
            self._polynomial = tuple(tensors["coefficients"].tolist())
            low, high = tensors["range"].tolist()
            self._range = (low, high)
            least = _minimum(self._polynomial, low, high)
            if least >= self.threshold:
                raise UserError(
                    f"policy 'teacache': every step of this model moves the output by {least:.3g} "
                    f"or more, so a threshold of {self.threshold:g} never skips; raise it"
                )
        elif isinstance(self.coefficients, str):
            self._polynomial = PUBLISHED[self.coefficients]
        else:
            self._polynomial = tuple(self.coefficients)
        return ("block 0: modulated input", "video tokens after the blocks")

    def computes(self, step: StepInput, state: State) -> bool:
        """Add this step's rescaled change and compare the sum with the threshold."""
        modulated = _first_block(self.host).modulated(state)
        previous = self.store.get("modulated")
        self.store["modulated"] = modulated
        if previous is not None and step.index < self.steps - 1:
            low, high = self._range
            change = min(max(_change(modulated, previous), low), high)
            self._distance += float(np.polyval(self._polynomial, change))
            if self._distance < self.threshold:
                return False
        self._distance = 0.0
        return True

    @classmethod
    def fit(cls, host: Host, schedule: Sequence[float], batches: Batches) -> dict[str, Tensor]:
        """Fit the polynomial from the change of the modulated input to that of the tokens.

        Least squares over all pairs of neighbouring steps of all runs; the degree is 4, or as much
        as the number of pairs of one run allows.

        Args:
            host: the network.
            schedule: times [steps + 1].
            batches: noise [B, C, F, H, W] and condition of each run.

        Returns:
            ``coefficients`` [degree + 1], ``range`` [2] of the changes that were seen, and the
            pairs ``input_change`` and ``output_change`` [runs * (steps - 1)], all float64.

        Raises:
            UserError: fewer than 2 steps, a host without modulated input, or tokens that the
                blocks leave unchanged.
        """
        steps = len(schedule) - 1
        if steps < 2:
            raise UserError(
                f"policy 'teacache' learns from neighbouring steps and a run of {steps} has none; "
                "calibrate with at least 2 steps"
            )
        pairs = torch.tensor(list(_changes(host, schedule, batches)), dtype=torch.float64)
        if not pairs.isfinite().all():
            raise UserError(
                "policy 'teacache': the tokens of the host are all zero; train it first"
            )
        inputs, outputs = pairs.unbind(1)
        degree = min(_DEGREE, steps - 2)
        coefficients = np.polyfit(inputs.numpy(), outputs.numpy(), degree)
        return {
            "coefficients": torch.from_numpy(coefficients),
            "range": torch.stack([inputs.min(), inputs.max()]),
            "input_change": inputs.clone(),
            "output_change": outputs.clone(),
        }

    @classmethod
    def summary(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say the coefficients, the range of the fit and its error."""
        coefficients = tensors["coefficients"].tolist()
        low, high = tensors["range"].tolist()
        inputs, outputs = tensors["input_change"].numpy(), tensors["output_change"].numpy()
        error = float(np.sqrt(np.mean((np.polyval(coefficients, inputs) - outputs) ** 2)))
        return [
            f"coefficients: [{', '.join(f'{value:.6g}' for value in coefficients)}]",
            f"fitted on {len(inputs)} pairs of steps, changes of the input {low:.3g} to {high:.3g}",
            f"root mean square error {error:.3g}, mean change of the output {outputs.mean():.3g}",
        ]


def _first_block(host: Host) -> ModulatedBlock:
    block: Any = host.blocks[0] if len(host.blocks) else None
    if not isinstance(block, ModulatedBlock):
        found = "has no blocks" if block is None else f"has a {type(block).__name__} there"
        raise UserError(
            "policy 'teacache' reads modulated(state) of the host's first block, but the host "
            f"{found}; use a policy that reads the output, such as 'easycache'"
        )
    return block


def _change(now: Tensor, before: Tensor) -> float:
    """Return mean|now - before| / mean|before| over everything, with one read of the device."""
    return float((now - before).abs().mean() / before.abs().mean())


def _changes(
    host: Host, schedule: Sequence[float], batches: Batches
) -> Iterator[tuple[float, float]]:
    """Yield the changes of modulated input and output tokens between neighbouring steps."""
    block = _first_block(host)
    last: tuple[Tensor, Tensor] | None = None
    for index, before, after in observe(host, schedule, batches):
        now = (block.modulated(before), after.video)
        if index and last is not None:
            yield _change(now[0], last[0]), _change(now[1], last[1])
        last = now


def _minimum(polynomial: Sequence[float], low: float, high: float) -> float:
    """Return the smallest value of a polynomial on an interval."""
    turns = np.roots(np.polyder(np.poly1d(polynomial)))
    inside = [float(z.real) for z in turns if abs(z.imag) < 1e-9 and low < z.real < high]
    return float(min(np.polyval(polynomial, [low, high, *inside])))
