# SPDX-License-Identifier: Apache-2.0
"""Random times and time pairs for the distillation losses.

Every function takes an explicit generator and draws the same amount of numbers whatever its
options are, so that a step's randomness depends on nothing but the generator's seed. Times are
float32 tensors ``[B]`` in [0, 1]; t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interval_pairs", "sample_times", "shift_time"]


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Map u in [0, 1] as a flow-shift schedule does: ``s u / (1 + (s - 1) u)``.

    Args:
        u: Times of the unshifted schedule, any shape.
        shift: Flow shift s > 0; 1 changes nothing, larger values move times towards noise.

    Returns:
        Shifted times of the same shape.
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


def sample_times(
    count: int,
    generator: torch.Generator,
    *,
    distribution: str = "uniform",
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Draw training times.

    Args:
        count: Number of times B.
        generator: Source of randomness; decides the device too.
        distribution: ``"uniform"``: U(0, 1). ``"shifted"``: U(0, 1) through :func:`shift_time`.
            ``"logit_normal"``: ``sigmoid(mean + std * n)`` with n ~ N(0, 1), as in Stable
            Diffusion 3 (arXiv 2403.03206).
        shift: Flow shift of ``"shifted"``.
        mean: Mean of the logit of ``"logit_normal"``.
        std: Standard deviation of the logit of ``"logit_normal"``.

    Returns:
        float32 times ``[count]`` in [0, 1].

    Raises:
        ValueError: If the distribution is unknown.
    """
    device = generator.device
    if distribution == "logit_normal":
        normal = torch.randn(count, generator=generator, device=device)
        return torch.sigmoid(mean + std * normal)
    uniform = torch.rand(count, generator=generator, device=device)
    if distribution == "uniform":
        return uniform
    if distribution == "shifted":
        return shift_time(uniform, shift)
    raise ValueError(
        f"distribution must be 'uniform', 'shifted' or 'logit_normal', got {distribution!r}"
    )


def interval_pairs(
    t: Tensor, generator: torch.Generator, *, restriction: float = 1.0, equal_fraction: float = 0.0
) -> Tensor:
    """Draw the end r of each interval that starts at t (Restricted MeanFlow, DisCa Algorithm 2).

    ``T ~ U(0, R)``, ``r = max(0, t - T)``, so ``t - r <= R`` always, and for t ~ U(0, 1) the share
    of intervals that end on clean data is ``P(r = 0) = R / 2``. R = 1 is plain MeanFlow.

    Args:
        t: Interval starts ``[B]``.
        generator: Source of randomness.
        restriction: The longest interval R in (0, 1].
        equal_fraction: Share of samples whose r is set to t (plain regression of the velocity).

    Returns:
        r ``[B]``, ``0 <= r <= t``.

    Raises:
        ValueError: If R is outside (0, 1] or the fraction outside [0, 1].
    """
    if not 0.0 < restriction <= 1.0:
        raise ValueError(f"the restriction R must be in (0, 1], got {restriction}")
    if not 0.0 <= equal_fraction <= 1.0:
        raise ValueError(f"equal_fraction must be in [0, 1], got {equal_fraction}")
    length = restriction * torch.rand(t.shape, generator=generator, device=t.device)
    equal = torch.rand(t.shape, generator=generator, device=t.device) < equal_fraction
    return torch.where(equal, t, (t - length).clamp_min(0.0))
