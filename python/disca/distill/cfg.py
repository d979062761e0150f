# SPDX-License-Identifier: Apache-2.0
"""The CFG-distillation stage: two guided passes become one (DisCa Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disca.data.source import ClipSource
from disca.distill.batch import NoisyBatch, broadcast, draw_batch, interpolate, sample_error
from disca.distill.config import CfgStage
from disca.distill.times import sample_times
from disca.distill.trainer import StepOutput
from disca.models.condition import Condition
from disca.models.dit import DiT

__all__ = ["CfgTask", "guided_velocity", "teacher_guided_velocity"]


def guided_velocity(conditional: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """Return ``v_u + g (v_c - v_u)`` (classifier-free guidance, DisCa Algorithm 1).

    Args:
        conditional: v_c ``[B, C, F, H, W]``.
        unconditional: v_u of the same shape.
        guidance: Scales g ``[B]``; 1 gives v_c, 0 gives v_u.

    Returns:
        The guided velocity, of the same shape.
    """
    return torch.lerp(unconditional, conditional, broadcast(guidance, conditional))


@torch.no_grad()
def teacher_guided_velocity(
    teacher: DiT, x_t: Tensor, t: Tensor, condition: Condition, null: Condition
) -> Tensor:
    """Return the teacher's guided velocity; both passes run as one batch.

    Args:
        teacher: Frozen undistilled network.
        x_t: Noisy clips ``[B, C, F, H, W]``.
        t: Times ``[B]``.
        condition: Conditions with guidance scales.
        null: Empty conditions.

    Returns:
        Target velocity of the shape of x_t.
    """
    scales = condition.guidance
    if scales is None:
        raise ValueError("the condition has no guidance scale; use Condition.with_guidance")
    both = Condition.cat([condition.with_guidance(None), null.with_guidance(None)])
    velocity = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), None, both)
    conditional, unconditional = velocity.chunk(2)
    return guided_velocity(conditional, unconditional, scales)


class CfgTask:
    """Regresses the guided velocity with a student that takes the scale as an input.

    ``g ~ U[1, 8]``, ``loss = mean (student(x_t, t, c, g) - (v_u + g (v_c - v_u)))^2``.

    Args:
        name: Name of the stage.
        model: Student with a guidance embedder.
        teacher: Undistilled network; frozen and put into evaluation mode here.
        source: Training clips.
        settings: Settings of the stage.
    """

    def __init__(
        self, name: str, model: DiT, teacher: DiT, source: ClipSource, settings: CfgStage
    ) -> None:
        self.name = name
        self.model = model
        self.teacher = teacher.eval().requires_grad_(False)
        self.source = source
        self.settings = settings
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.device = next(model.parameters()).device

    def use_averaged(self, averaged: Mapping[str, nn.Module]) -> None:
        """Do nothing: this loss uses no averaged weights."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Update the model in every step."""
        return ("model",)

    def draw(self, generator: torch.Generator) -> NoisyBatch:
        """Draw clips, noise and guidance scales."""
        settings = self.settings
        return draw_batch(
            self.source,
            settings.batch,
            generator,
            guidance=settings.guidance,
            device=self.device,
        )

    def compute(self, phase: str, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        """Return the regression loss of one micro-batch."""
        settings = self.settings
        batch = self.draw(generator)
        t = sample_times(settings.batch, generator, **settings.time.model_dump()).to(self.device)
        x_t = interpolate(batch.x0, batch.noise, t)
        null = self.source.null(settings.batch).to(self.device)
        target = teacher_guided_velocity(self.teacher, x_t, t, batch.condition, null)
        velocity = self.model(x_t, t, None, batch.condition)
        errors = sample_error(velocity, target)
        tensors = {"x_t": x_t, "teacher velocity": target, "velocity": velocity.detach()}
        return StepOutput(errors.mean(), errors.detach(), t, t, tensors=tensors)
