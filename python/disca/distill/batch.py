# SPDX-License-Identifier: Apache-2.0
"""What the losses of all stages share: noisy batches, guidance scales, per-sample errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disca.data.source import ClipSource
from disca.models.condition import Condition

__all__ = [
    "NoisyBatch",
    "broadcast",
    "draw_batch",
    "draw_guidance",
    "drop_condition",
    "interpolate",
    "sample_error",
]


def broadcast(t: Tensor, like: Tensor) -> Tensor:
    """View times ``[B]`` as ``[B, 1, ..., 1]`` beside a tensor of clips."""
    return t.view(-1, *([1] * (like.dim() - 1)))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return ``x_t = (1 - t) x0 + t eps``.

    Args:
        x0: Clips ``[B, C, F, H, W]``.
        noise: Gaussian noise of the same shape.
        t: Times ``[B]`` in [0, 1].

    Returns:
        Noisy clips of the same shape.
    """
    return torch.lerp(x0, noise, broadcast(t, x0))


def sample_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample ``[B]``, in float32 at least."""
    difference = prediction.float() - target.float()
    return difference.square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class NoisyBatch:
    """Clips, the noise they are mixed with, and their conditions.

    Attributes:
        x0: Clean clips ``[B, C, F, H, W]``.
        noise: Gaussian noise of the same shape.
        condition: Conditions of the clips, with the guidance scale if the model takes one.
    """

    x0: Tensor
    noise: Tensor
    condition: Condition

    @property
    def velocity(self) -> Tensor:
        """The velocity ``eps - x0`` of the straight path through both ends."""
        return self.noise - self.x0


def draw_guidance(
    setting: float | tuple[float, float] | None, count: int, generator: torch.Generator
) -> Tensor | None:
    """Return guidance scales ``[count]``: fixed, uniform in a range, or None for none."""
    uniform = torch.rand(count, generator=generator)
    if setting is None:
        return None
    low, high = setting if isinstance(setting, tuple) else (setting, setting)
    return low + (high - low) * uniform


def draw_batch(
    source: ClipSource,
    count: int,
    generator: torch.Generator,
    *,
    guidance: float | tuple[float, float] | None = None,
    device: torch.device | str = "cpu",
) -> NoisyBatch:
    """Draw training clips, noise and guidance scales.

    Args:
        source: Where clips come from; the training split is used.
        count: Batch size.
        generator: CPU generator, so that a run does not depend on the device.
        guidance: See :func:`draw_guidance`.
        device: Where the batch is put.

    Returns:
        The batch on the device.
    """
    clips = source.sample(count, generator, split="train")
    noise = torch.randn(clips.clips.shape, generator=generator)
    scales = draw_guidance(guidance, count, generator)
    condition = clips.condition
    if scales is not None:
        condition = condition.with_guidance(scales)
    return NoisyBatch(clips.clips.to(device), noise.to(device), condition.to(device))


def drop_condition(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """Replace the conditions of some samples by the empty one (condition dropout).

    Args:
        condition: Conditions of B samples.
        null: Empty conditions of B samples, padded to the same number of text tokens.
        dropped: bool ``[B]``, which samples to replace.

    Returns:
        The mixed conditions; guidance scales stay.
    """
    pooled = condition.pooled
    if pooled is not None and null.pooled is not None:
        pooled = torch.where(dropped[:, None], null.pooled, pooled)
    return replace(
        condition,
        text=torch.where(dropped[:, None, None], null.text, condition.text),
        text_lengths=torch.where(dropped, null.text_lengths, condition.text_lengths),
        pooled=pooled,
    )
