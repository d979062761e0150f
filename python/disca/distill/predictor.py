# SPDX-License-Identifier: Apache-2.0
"""The predictor stage: regression of the student, then a hinge GAN (DisCa Algorithm 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disca.cache.steps import resolve_full_steps
from disca.data.source import ClipSource
from disca.distill.batch import broadcast, draw_batch, interpolate, sample_error
from disca.distill.config import PredictorStage
from disca.distill.times import interval_pairs, sample_times
from disca.distill.trainer import StepOutput, step_generator
from disca.distill.trajectories import TrajectoryBank, record_trajectories
from disca.models.condition import Condition
from disca.models.discriminator import Discriminator
from disca.models.dit import DiT
from disca.models.predictor import Predictor
from disca.sample.schedule import flow_shift_schedule

__all__ = [
    "PredictorTask",
    "discriminator_hinge",
    "generator_hinge",
    "one_step",
    "schedule_gaps",
    "schedule_pairs",
    "shifted_pair",
]


def shifted_pair(t: Tensor, r: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(t', r') = (max(0, t - D), max(0, r - D))`` (DisCa Algorithm 3).

    Args:
        t: Times of the cached step ``[B]``.
        r: Its ends ``[B]``.
        delta: Gaps D >= 0 ``[B]``.

    Returns:
        Times and ends of the predicted step ``[B]``.
    """
    return (t - delta).clamp_min(0.0), (r - delta).clamp_min(0.0)


def schedule_pairs(lists: Sequence[str], steps: int) -> Tensor:
    """List the pairs of steps that caching meets when sampling.

    Args:
        lists: Full-step lists, as :func:`disca.cache.steps.resolve_full_steps` takes them.
        steps: Steps of the schedule.

    Returns:
        int64 ``[K, 2]``: the cached and the predicted step, one row for each predicted step of
        each list.

    Raises:
        UserError: If a list is unknown or does not fit the steps.
    """
    rows = []
    for spec in lists:
        full = set(resolve_full_steps(spec, steps))
        cached = 0
        for step in range(steps):
            if step in full:
                cached = step
            else:
                rows.append([cached, step])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)


def schedule_gaps(lists: Sequence[str], steps: int, shift: float) -> Tensor:
    """List the time pairs that caching meets when sampling.

    Args:
        lists: Full-step lists, as :func:`disca.cache.steps.resolve_full_steps` takes them.
        steps: Steps of the schedule.
        shift: Its flow shift.

    Returns:
        float32 ``[K, 4]``: rows (t, r, t', r') of the cached and the predicted step, one for each
        predicted step of each list.

    Raises:
        UserError: If a list is unknown, does not fit the steps or predicts nothing.
    """
    cached, predicted = schedule_pairs(lists, steps).unbind(dim=1)
    index = torch.stack([cached, cached + 1, predicted, predicted + 1], dim=1)
    return flow_shift_schedule(steps, shift)[index]


def one_step(x_t: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return ``x_r = x_t - (t - r) u``, the latent after one step."""
    return x_t - broadcast(t - r, x_t) * u


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return ``mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))`` over heads (DisCa Eq. 7).

    Args:
        real: Logits of the student's latents, one tensor a head.
        fake: Logits of the predictor's latents, one tensor a head.

    Returns:
        Scalar loss.
    """
    terms = [F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """Return ``mean max(0, 1 - D(fake))`` over heads, the second term of DisCa Eq. 8."""
    return torch.stack([F.relu(1 - logits).mean() for logits in fake]).mean()


def _mean_logit(logits: Sequence[Tensor]) -> float:
    return float(torch.stack([x.detach().float().mean() for x in logits]).mean())


@dataclass(frozen=True)
class _Pending:
    """What the discriminator's phase takes over from the predictor's phase of the same step."""

    t: Tensor
    r: Tensor
    condition: Condition
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class _Drawn:
    """A predicted step: its times, condition and latent, the cached tokens, the student's u."""

    t: Tensor
    r: Tensor
    condition: Condition
    x: Tensor
    cache: Tensor
    target: Tensor


class PredictorTask:
    """Trains a predictor of the frozen student's last-layer tokens.

    First ``L = mean (u_P - u_M)^2`` on velocities, after the student's own head; from
    ``mse_steps`` on a hinge term on the latent after one step, and a discriminator on the frozen
    student's features, updated in turn.

    Args:
        name: Name of the stage.
        predictor: Network to train.
        discriminator: Its opponent, or None when no step uses it.
        host: Student; frozen and put into evaluation mode here.
        source: Training clips.
        settings: Settings of the stage.
        seed: Seed of the recorded trajectories.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        discriminator: Discriminator | None,
        host: DiT,
        source: ClipSource,
        settings: PredictorStage,
        *,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.predictor = predictor
        self.discriminator = discriminator
        self.host = host.eval().requires_grad_(False)
        self.source = source
        self.settings = settings
        modules: dict[str, nn.Module] = {"predictor": predictor}
        if discriminator is not None:
            modules["discriminator"] = discriminator
        self.modules: Mapping[str, nn.Module] = modules
        self.device = next(predictor.parameters()).device
        self.gaps = schedule_gaps(
            settings.schedule_lists, settings.schedule_steps, settings.schedule_shift
        )
        self.pairs = schedule_pairs(settings.schedule_lists, settings.schedule_steps)
        self.seed = seed
        self._bank: tuple[int, TrajectoryBank] | None = None
        self._pending: dict[int, _Pending] = {}

    def use_averaged(self, averaged: Mapping[str, nn.Module]) -> None:
        """Do nothing: this loss uses no averaged weights."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Update the predictor, and after ``mse_steps`` the discriminator too."""
        if self.discriminator is None or step < self.settings.mse_steps:
            return ("predictor",)
        return ("predictor", "discriminator")

    def compute(self, phase: str, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        """Return the loss of the predictor, or of the discriminator on the same micro-batch."""
        if phase == "discriminator":
            return self._discriminate(self._pending.pop(micro))
        return self._predict(step, micro, generator)

    def times(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw ``(t, r, t', r')`` of the cached and the predicted step, each ``[B]``."""
        settings = self.settings
        count = settings.batch
        if settings.delta == "schedule":
            index = torch.randint(len(self.gaps), (count,), generator=generator)
            return self.gaps[index].to(self.device).unbind(dim=1)  # type: ignore[return-value]
        t = sample_times(count, generator, **settings.time.model_dump())
        r = interval_pairs(t, generator, restriction=settings.restriction)
        delta = settings.delta_max * torch.rand(count, generator=generator)
        later = shifted_pair(t, r, delta)
        return (
            t.to(self.device),
            r.to(self.device),
            later[0].to(self.device),
            later[1].to(self.device),
        )

    def _end(self, r: Tensor) -> Tensor | None:
        return r if self.host.mean_flow else None

    def _draw(self, step: int, generator: torch.Generator) -> _Drawn:
        """Draw what a micro-batch predicts, from training clips or from the student's own runs."""
        if self.settings.points == "trajectory":
            return self._draw_recorded(step, generator)
        settings = self.settings
        batch = draw_batch(
            self.source,
            settings.batch,
            generator,
            guidance=settings.guidance,
            device=self.device,
        )
        t, r, t_later, r_later = self.times(generator)
        condition = batch.condition
        x_t = interpolate(batch.x0, batch.noise, t)
        with torch.no_grad():
            cache = self.host.run(self.host.embed(x_t, t, self._end(r), condition)).tokens
            x_later = interpolate(batch.x0, batch.noise, t_later)
            if settings.points == "student":
                u = self.host(x_t, t, self._end(t_later), condition)
                x_later = one_step(x_t, u, t, t_later)
            target = self.host(x_later, t_later, self._end(r_later), condition)
        return _Drawn(t_later, r_later, condition, x_later, cache, target)

    def _draw_recorded(self, step: int, generator: torch.Generator) -> _Drawn:
        """Draw recorded runs and, for each, a cached and a predicted step of the schedule."""
        settings = self.settings
        schedule = flow_shift_schedule(settings.schedule_steps, settings.schedule_shift)
        turn = step // settings.refresh
        if self._bank is None or self._bank[0] != turn:
            # A pure function of the turn, so that a resumed run records the same.
            seeded = step_generator(self.seed, f"{self.name}/trajectories", turn, 0)
            self._bank = (
                turn,
                record_trajectories(
                    self.host,
                    self.source,
                    schedule,
                    settings.trajectories,
                    seeded,
                    guidance=settings.guidance,
                ),
            )
        bank = self._bank[1]
        run = torch.randint(len(bank), (settings.batch,), generator=generator)
        pair = self.pairs[torch.randint(len(self.pairs), (settings.batch,), generator=generator)]
        cached, predicted = pair.unbind(dim=1)
        return _Drawn(
            schedule[predicted].to(self.device),
            schedule[predicted + 1].to(self.device),
            bank.condition.select(run.to(self.device)),
            bank.x[predicted, run],
            bank.tokens[cached, run],
            bank.velocity[predicted, run],
        )

    def _predict(self, step: int, micro: int, generator: torch.Generator) -> StepOutput:
        drawn = self._draw(step, generator)
        t_later, r_later, condition = drawn.t, drawn.r, drawn.condition
        x_later, cache, target = drawn.x, drawn.cache, drawn.target
        with torch.no_grad():
            state = self.host.embed(x_later, t_later, self._end(r_later), condition)
            reuse = self.host.head(state.with_tokens(cache))
        predicted = self.predictor.velocity(self.host, state, cache)
        errors = sample_error(predicted, target)
        weight = (t_later - r_later).pow(self.settings.step_power)
        loss = self.settings.mse_weight * (weight / weight.mean() * errors).mean()
        logs = {
            "mse": float(errors.detach().mean()),
            "reuse_mse": float(sample_error(reuse, target).mean()),
        }
        if self.discriminator is not None and step >= self.settings.mse_steps:
            fake = one_step(x_later, predicted, t_later, r_later)
            real = one_step(x_later, target, t_later, r_later)
            self._pending[micro] = _Pending(t_later, r_later, condition, real, fake.detach())
            self.discriminator.requires_grad_(False)
            logits = self.discriminator(self.host, fake, r_later, self._end(r_later), condition)
            gan = generator_hinge(logits)
            logs |= {"gan": float(gan.detach()), "logit_fake": _mean_logit(logits)}
            loss = loss + self.settings.gan_weight * gan
        tensors = {"cache": cache, "target": target, "predicted": predicted.detach()}
        return StepOutput(loss, errors.detach(), t_later, r_later, logs, tensors)

    def _discriminate(self, pending: _Pending) -> StepOutput:
        if self.discriminator is None:
            raise RuntimeError("the discriminator's phase needs a discriminator")
        self.discriminator.requires_grad_(True)
        r, end = pending.r, self._end(pending.r)
        real = self.discriminator(self.host, pending.real, r, end, pending.condition)
        fake = self.discriminator(self.host, pending.fake, r, end, pending.condition)
        loss = discriminator_hinge(real, fake)
        logs = {"logit_real": _mean_logit(real), "logit_fake": _mean_logit(fake)}
        tensors = {"real latent": pending.real, "fake latent": pending.fake}
        losses = loss.detach().expand(len(pending.t))
        return StepOutput(loss, losses, pending.t, r, logs, tensors)
