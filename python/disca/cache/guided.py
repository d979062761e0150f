# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: the two passes a step that CFG distillation folds into one."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any

from disca.cache.none import NoCache
from disca.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from disca.cache.policy import Resources, StepInput
    from disca.models.condition import Condition

__all__ = ["Guided"]


class Guided(NoCache):
    """Runs the host twice a step, with the prompt and without.

    ``v = v_null + guidance * (v_cond - v_null)`` (classifier-free guidance, arXiv 2207.12598). The
    passes are separate calls, so that each costs what one pass of a distilled model costs. For a
    host without a guidance input.

    Args:
        null: returns the empty condition of a batch size.
        guidance: the scale; 1 is the plain conditional velocity.

    Raises:
        UserError: a scale that is not finite; at reset, a host with a guidance input.
    """

    name = "cfg"

    def __init__(self, null: Callable[[int], Condition], guidance: float) -> None:
        if not isfinite(guidance):
            raise UserError(f"policy 'cfg': guidance is a finite scale such as 4, got {guidance:g}")
        self.null = null
        self.guidance = guidance

    @classmethod
    def from_settings(cls, resources: Resources, **settings: Any) -> Guided:
        """Build the policy with the comparison's empty prompt and guidance."""
        return cls(**{"null": resources.null, "guidance": resources.guidance, **settings})

    def prepare(self) -> tuple[str, ...]:
        """Refuse a host that takes the scale as an input: it is guided in one pass."""
        # Hosts have no flag for it; those with a configuration such as DiT's say it there.
        if getattr(getattr(self.host, "config", None), "guidance_embed", False):
            raise UserError(
                "policy 'cfg' guides a model by two passes a step, but this one takes the guidance "
                "scale as an input: CFG is already distilled into it; use the policy 'none', or "
                "'cfg' with a model without that input, such as the stage 'teacher'"
            )
        return super().prepare()

    def evaluate(self, step: StepInput) -> Tensor:
        """Return the guided velocity [B, C, F, H, W]."""
        host, end = self.host, step.r if self.host.mean_flow else None

        def velocity(cond: Condition) -> Tensor:
            return host.head(host.run(host.embed(step.x, step.t, end, cond)))

        null = velocity(self.null(len(step.x)))
        return null + self.guidance * (velocity(step.cond) - null)
