# SPDX-License-Identifier: Apache-2.0
"""The MeanFlow stages: plain (R = 1) and restricted (R < 1), DisCa Algorithm 2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disca.data.source import ClipSource
from disca.distill.batch import broadcast, draw_batch, interpolate, sample_error
from disca.distill.config import MeanFlowStage
from disca.distill.times import interval_pairs, sample_times
from disca.distill.trainer import StepOutput
from disca.models.condition import Condition
from disca.models.dit import DiT
from disca_kernels import dual

__all__ = [
    "MeanFlowTask",
    "adaptive_weight",
    "clip_correction",
    "clip_tangent",
    "mean_velocity_and_slope",
    "meanflow_target",
    "normalised_target",
]


def mean_velocity_and_slope(
    model: nn.Module,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    condition: Condition,
    direction: Tensor,
    *,
    tangent_width: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return u(x_t, r, t) and ``du/dt = v . d_x u + d_t u`` in one forward-mode pass.

    The tangent is (v, 0, 1) in (x, r, t). u is tracked by autograd, du/dt is detached and leaves
    no graph (:func:`disca_kernels.dual.jvp`).

    Args:
        model: Called as ``model(x, t, r, condition, tangent_width=...)``.
        x_t: Noisy clips ``[B, C, F, H, W]``.
        t: Interval starts ``[B]``.
        r: Interval ends ``[B]``.
        condition: Conditions.
        direction: v, of the shape of x_t.
        tangent_width: Half-width h of the window over which the time features' derivative is
            averaged, a number or ``[B]``; 0 is exact.

    Returns:
        ``(u, du_dt)``, both of the shape of x_t.
    """

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = model(x, time, r, condition, tangent_width=tangent_width)
        return result

    u, slope = dual.jvp(velocity, (x_t, t), (direction, torch.ones_like(t)))
    return u, slope


def meanflow_target(
    velocity: Tensor, slope: Tensor, t: Tensor, r: Tensor, *, ratio: float = 1.0
) -> Tensor:
    """Return ``u_tgt = v - ratio (t - r) du/dt`` (MeanFlow, arXiv 2505.13447, DisCa Eq. 2).

    Args:
        velocity: v(x_t, t) ``[B, C, F, H, W]``.
        slope: du/dt of the same shape.
        t: Interval starts ``[B]``.
        r: Interval ends ``[B]``; where r = t the target is v.
        ratio: Warm-up factor of the tangent in [0, 1]; 1 is the paper's target.

    Returns:
        The detached target.
    """
    return (velocity - broadcast(ratio * (t - r), slope) * slope).detach()


def clip_tangent(slope: Tensor, limit: float) -> Tensor:
    """Scale du/dt of each sample down to a root mean square of at most ``limit``."""
    rms = slope.flatten(1).float().square().mean(dim=1).sqrt()
    return slope * broadcast((limit / rms.clamp_min(limit)).to(slope.dtype), slope)


def clip_correction(slope: Tensor, t: Tensor, r: Tensor, limit: float) -> Tensor:
    """Scale du/dt of each sample so that ``(t - r) du/dt`` has a root mean square <= ``limit``.

    By the MeanFlow identity that product is v - u, a difference of two averages of the velocity: it
    is never larger than twice the velocity's own size. Where the flow branches (a sample chooses
    where its content goes) du/dt grows beyond that for as long as u has not adapted, and its
    product with a long interval would drown every other sample.

    Args:
        slope: du/dt ``[B, C, F, H, W]``.
        t: Interval starts ``[B]``.
        r: Interval ends ``[B]``.
        limit: Largest root mean square of the product over a sample.

    Returns:
        The slopes, scaled down where needed.
    """
    rms = (t - r) * slope.flatten(1).float().square().mean(dim=1).sqrt()
    return slope * broadcast((limit / rms.clamp_min(limit)).to(slope.dtype), slope)


def normalised_target(u: Tensor, target: Tensor, constant: float) -> Tensor:
    """Return ``u - g / (|g| + c)`` with ``g = u - target``: tangent normalisation of sCM.

    |.| is the Euclidean norm over all elements of a sample, in float64 as in rCM (arXiv
    2410.11081, 2510.08431). The pull of a sample towards its target then has a norm below 1.

    Args:
        u: Model output ``[B, C, F, H, W]``.
        target: MeanFlow target of the same shape.
        constant: c > 0; the papers use 0.1.

    Returns:
        The detached target.
    """
    gap = (u - target).detach()
    norm = gap.flatten(1).double().norm(dim=1) + constant
    return u.detach() - (gap / broadcast(norm, gap)).to(u.dtype)


def adaptive_weight(errors: Tensor, size: int, power: float, constant: float) -> Tensor:
    """Return ``1 / (E + c)^p`` with E the squared error of a sample summed over its elements.

    Source: MeanFlow, arXiv 2505.13447 (ImageNet: p = 1, c = 0.01); p = 0 is plain MSE.

    Args:
        errors: Mean squared errors ``[B]``.
        size: Elements of a sample.
        power: p.
        constant: c.

    Returns:
        Detached weights ``[B]``.
    """
    return (errors.detach() * size + constant).pow(-power)


class MeanFlowTask:
    """Distils the average velocity over intervals no longer than R.

    ``t ~ U(0, 1)``, ``T ~ U(0, R)``, ``r = max(0, t - T)``; the frozen CFG-distilled network gives
    v, which is tangent and regression base; ``loss = mean (u - sg(v - (t - r) du/dt))^2``.

    Args:
        name: Name of the stage.
        model: Student with an r-embedder.
        teacher: CFG-distilled network; frozen and put into evaluation mode here.
        source: Training clips.
        settings: Settings of the stage.
    """

    def __init__(
        self, name: str, model: DiT, teacher: DiT, source: ClipSource, settings: MeanFlowStage
    ) -> None:
        self.name = name
        self.model = model
        self.teacher = teacher.eval().requires_grad_(False)
        self.source = source
        self.settings = settings
        self.modules: Mapping[str, nn.Module] = {"model": model}
        self.device = next(model.parameters()).device
        self.averaged: nn.Module | None = None

    def use_averaged(self, averaged: Mapping[str, nn.Module]) -> None:
        """Take the averaged weights, from which ``ema_target`` computes du/dt."""
        self.averaged = averaged.get("model")

    def phases(self, step: int) -> tuple[str, ...]:
        """Update the model in every step."""
        return ("model",)

    def compute(self, phase: str, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        """Return the MeanFlow loss of one micro-batch."""
        settings = self.settings
        batch = draw_batch(
            self.source,
            settings.batch,
            generator,
            guidance=settings.guidance,
            device=self.device,
        )
        t = sample_times(settings.batch, generator, **settings.time.model_dump())
        r = interval_pairs(
            t,
            generator,
            restriction=settings.restriction,
            equal_fraction=settings.equal_fraction,
        )
        t, r = t.to(self.device), r.to(self.device)
        x_t = interpolate(batch.x0, batch.noise, t)
        if settings.velocity == "data":
            velocity = batch.velocity
        else:
            with torch.no_grad():
                end = t if self.teacher.mean_flow else None
                velocity = self.teacher(x_t, t, end, batch.condition).float()
        u, slope = self._student(x_t, t, r, batch.condition, velocity)
        return self._loss(step, t, r, velocity, u, slope)

    def _student(
        self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition, velocity: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = self.settings.tangent_width
        half = 0.5 * (t - r) if width == "interval" else float(width)
        if not self.settings.ema_target or self.averaged is None:
            return mean_velocity_and_slope(
                self.model, x_t, t, r, condition, velocity, tangent_width=half
            )
        with torch.no_grad():
            _, slope = mean_velocity_and_slope(
                self.averaged, x_t, t, r, condition, velocity, tangent_width=half
            )
        return self.model(x_t, t, r, condition), slope

    def _loss(
        self, step: int, t: Tensor, r: Tensor, velocity: Tensor, u: Tensor, slope: Tensor
    ) -> StepOutput:
        settings = self.settings
        rms = slope.float().square().mean().sqrt()
        if settings.tangent_clip is not None:
            slope = clip_tangent(slope, settings.tangent_clip)
        if settings.correction_clip is not None:
            slope = clip_correction(slope, t, r, settings.correction_clip)
        ratio = min(1.0, step / settings.tangent_warmup) if settings.tangent_warmup else 1.0
        target = meanflow_target(velocity, slope, t, r, ratio=ratio)
        correction = sample_error(target, velocity).mean().sqrt()
        if settings.tangent_normalise is not None:
            target = normalised_target(u, target, settings.tangent_normalise)
        errors = sample_error(u, target)
        weighted = errors
        if settings.adaptive_power > 0:
            size = u[0].numel()
            weighted = (
                errors
                * size
                * adaptive_weight(errors, size, settings.adaptive_power, settings.adaptive_constant)
            )
        return StepOutput(
            weighted.mean(),
            errors.detach(),
            t,
            r,
            logs={
                "mse": float(errors.detach().mean()),
                "slope_rms": float(rms),
                "correction_rms": float(correction),
            },
            tensors={
                "teacher velocity": velocity,
                "u": u.detach(),
                "du/dt": slope,
                "target": target,
            },
        )
