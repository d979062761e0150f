# SPDX-License-Identifier: Apache-2.0
"""The teacher stage: flow matching with condition dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disca.data.source import ClipSource
from disca.distill.batch import draw_batch, drop_condition, interpolate, sample_error
from disca.distill.config import TeacherStage
from disca.distill.times import sample_times
from disca.distill.trainer import StepOutput
from disca.models.dit import DiT

__all__ = ["TeacherTask", "flow_matching_error"]


def flow_matching_error(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss of each sample: ``mean (v - (eps - x0))^2``.

    Source: Lipman et al., arXiv 2210.02747, with the straight path of rectified flow.

    Args:
        velocity: Predicted velocity ``[B, C, F, H, W]``.
        x0: Clean clips of the same shape.
        noise: Noise of the same shape.

    Returns:
        float32 losses ``[B]``.
    """
    return sample_error(velocity, noise - x0)


class TeacherTask:
    """Trains a DiT to predict the velocity of clips under their condition or none.

    A share of the conditions is replaced by the empty one, so that the model can be guided
    (classifier-free guidance, arXiv 2207.12598).

    Args:
        name: Name of the stage.
        model: The network to train.
        source: Training clips.
        settings: Settings of the stage.
    """

    def __init__(self, name: str, model: DiT, source: ClipSource, settings: TeacherStage) -> None:
        self.name = name
        self.model = model
        self.source = source
        self.settings = settings
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.device = next(model.parameters()).device

    def use_averaged(self, averaged: Mapping[str, nn.Module]) -> None:
        """Do nothing: this loss uses no averaged weights."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Update the model in every step."""
        return ("model",)

    def compute(self, phase: str, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        """Return the flow-matching loss of one micro-batch."""
        settings = self.settings
        batch = draw_batch(self.source, settings.batch, generator, device=self.device)
        t = sample_times(settings.batch, generator, **settings.time.model_dump()).to(self.device)
        dropped = torch.rand(settings.batch, generator=generator) < settings.dropout
        null = self.source.null(settings.batch).to(self.device)
        condition = drop_condition(batch.condition, null, dropped.to(self.device))
        x_t = interpolate(batch.x0, batch.noise, t)
        velocity = self.model(x_t, t, None, condition)
        errors = flow_matching_error(velocity, batch.x0, batch.noise)
        return StepOutput(
            errors.mean(),
            errors.detach(),
            t,
            t,
            tensors={"x_t": x_t, "velocity": velocity.detach()},
        )
