# SPDX-License-Identifier: Apache-2.0
"""Losses of the stages against closed forms and hand computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from disca.data.digits import MovingDigits
from disca.distill.batch import (
    draw_batch,
    interpolate,
    sample_error,
)
from disca.distill.cfg import CfgTask, guided_velocity, teacher_guided_velocity
from disca.distill.config import CfgStage, MeanFlowStage, OptimizerConfig, TeacherStage
from disca.distill.flow import TeacherTask, flow_matching_error
from disca.distill.meanflow import (
    MeanFlowTask,
    adaptive_weight,
    clip_correction,
    clip_tangent,
    mean_velocity_and_slope,
    meanflow_target,
    normalised_target,
)
from disca.models.configs import DiTConfig
from disca.models.dit import DiT


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source() -> MovingDigits:
    return MovingDigits(frames=4, size=8, starts="free")


def small_dit(source: MovingDigits, *, dtype: torch.dtype = torch.float32, **flags: bool) -> DiT:
    """A DiT of 20 thousand parameters none of which is zero."""
    config = DiTConfig(
        in_channels=1,
        out_channels=1,
        patch=(2, 4, 4),
        hidden=16,
        heads=2,
        double_blocks=1,
        single_blocks=1,
        rope_dims=(4, 2, 2),
        text_dim=source.text_dim,
        text_refiner_depth=0,
        pooled_dim=source.pooled_dim,
        time_features=8,
        **flags,
    )
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(1)))
    return model.to(dtype)


# Teacher and CFG distillation.


def test_flow_matching_error_by_hand() -> None:
    x0 = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    noise = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    velocity = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert flow_matching_error(velocity, x0, noise).tolist() == [2.5, 0.0]


def test_guided_velocity_algebra() -> None:
    conditional, unconditional = torch.randn(2, 3, 1, 2, 4, 4, dtype=torch.float64)
    g = torch.tensor([0.0, 1.0, 6.0], dtype=torch.float64)
    guided = guided_velocity(conditional, unconditional, g)
    torch.testing.assert_close(guided[0], unconditional[0])
    torch.testing.assert_close(guided[1], conditional[1])
    torch.testing.assert_close(guided[2], 6 * conditional[2] + (1 - 6) * unconditional[2])


def test_teacher_target_equals_two_passes(source: MovingDigits) -> None:
    teacher = small_dit(source)
    batch = draw_batch(source, 3, generator(), guidance=(1.0, 8.0))
    t = torch.tensor([0.2, 0.6, 1.0])
    null = source.null(3)
    target = teacher_guided_velocity(teacher, batch.noise, t, batch.condition, null)
    with torch.no_grad():
        conditional = teacher(batch.noise, t, None, batch.condition.with_guidance(None))
        unconditional = teacher(batch.noise, t, None, null)
    scale = batch.condition.guidance
    assert scale is not None
    expected = unconditional + scale.view(-1, 1, 1, 1, 1) * (conditional - unconditional)
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad
    with pytest.raises(ValueError, match="no guidance scale"):
        teacher_guided_velocity(teacher, batch.noise, t, source.null(3), null)


def test_cfg_student_that_equals_the_target_has_no_loss(source: MovingDigits) -> None:
    teacher = small_dit(source)
    student = DiT.from_teacher(teacher, guidance_embed=True)
    at_one = CfgTask("cfg", student, teacher, source, CfgStage(steps=1, batch=4, guidance=1.0))
    other = CfgTask("cfg", student, teacher, source, CfgStage(steps=1, batch=4, guidance=4.0))
    assert float(at_one.compute("model", 0, 0, generator()).loss.detach()) < 1e-10
    assert float(other.compute("model", 0, 0, generator()).loss.detach()) > 1e-3


def test_teacher_task_drops_conditions(source: MovingDigits) -> None:
    model = small_dit(source)
    errors = [
        TeacherTask("teacher", model, source, TeacherStage(steps=1, batch=8, dropout=d))
        .compute("model", 0, 0, generator())
        .per_sample
        for d in (0.0, 0.5, 1.0)
    ]
    assert bool((errors[0] != errors[2]).all())
    half = (errors[1] == errors[0]) | (errors[1] == errors[2])
    assert bool(half.all())


# MeanFlow.


class LinearFlow(nn.Module):
    """The exact average velocity of dx/dt = a x: u = x_t (1 - exp(-a (t - r))) / (t - r)."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: object, *, tangent_width: object):
        length = (t - r).view(-1, 1)
        return x * (1 - torch.exp(-self.a * length)) / length


@pytest.mark.parametrize("a", [-1.5, 0.3, 2.0])
def test_exact_average_velocity_is_a_fixed_point(a: float) -> None:
    model = LinearFlow(a)
    x = torch.randn(5, 7, dtype=torch.float64, generator=generator())
    t = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.1, 0.6, 0.2, 0.0], dtype=torch.float64)
    velocity = a * x
    u, slope = mean_velocity_and_slope(model, x, t, r, None, velocity)  # type: ignore[arg-type]
    target = meanflow_target(velocity, slope, t, r)
    torch.testing.assert_close(target, u.detach(), rtol=1e-12, atol=1e-12)
    # One step of the average velocity lands on the exact solution x_r = x_t exp(a (r - t)).
    x_r = x - (t - r).view(-1, 1) * u
    torch.testing.assert_close(x_r, x * torch.exp(a * (r - t)).view(-1, 1))


def test_target_is_the_velocity_where_r_equals_t() -> None:
    v, slope = torch.randn(2, 3, 4)
    t = torch.tensor([0.3, 0.5, 1.0])
    assert torch.equal(meanflow_target(v, slope, t, t), v)
    half = meanflow_target(v, slope, t, t - 0.2, ratio=0.5)
    torch.testing.assert_close(half, v - 0.1 * slope)


def test_clipped_tangents() -> None:
    slope = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped = clip_tangent(slope, 1.0)
    torch.testing.assert_close(clipped[0], slope[0] * math.sqrt(2) / 5)
    assert torch.equal(clipped[1:], slope[1:])


def test_clipped_corrections_are_bounded_by_interval_times_slope() -> None:
    slope = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    t, r = torch.tensor([0.9, 0.9, 0.5]), torch.tensor([0.4, 0.8, 0.0])
    limit = 1.0  # the products' rms is 1.77, 0.35 and 0
    clipped = clip_correction(slope, t, r, limit)
    assert float((0.5 * clipped[0]).square().mean().sqrt()) == pytest.approx(limit)
    assert torch.equal(clipped[1:], slope[1:])


def test_normalised_target_by_hand() -> None:
    u = torch.tensor([[3.0, 4.0]], requires_grad=True)
    target = normalised_target(u, torch.zeros(1, 2), 0.1)
    torch.testing.assert_close(target, torch.tensor([[3.0, 4.0]]) * (1 - 1 / 5.1))
    assert not target.requires_grad


def test_adaptive_weight_by_hand() -> None:
    errors = torch.tensor([0.5, 2.0], requires_grad=True)
    weights = adaptive_weight(errors, 4, 1.0, 0.01)
    torch.testing.assert_close(weights, 1 / (torch.tensor([2.0, 8.0]) + 0.01))
    assert not weights.requires_grad
    assert torch.equal(adaptive_weight(errors, 4, 0.0, 0.01), torch.ones(2))


@pytest.mark.parametrize("width", [0.0, 0.05])
def test_gradient_equals_the_functional_one(source: MovingDigits, width: float) -> None:
    model = small_dit(source, dtype=torch.float64, guidance_embed=True, mean_flow=True)
    batch = draw_batch(source, 3, generator(), guidance=(1.0, 8.0))
    condition = batch.condition.to(dtype=torch.float64)
    t = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64)
    x = interpolate(batch.x0.double(), batch.noise.double(), t)
    v = batch.velocity.double()

    def gradients(u: Tensor, slope: Tensor) -> list[Tensor]:
        loss = sample_error_double(u, meanflow_target(v, slope, t, r))
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    def sample_error_double(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1).mean()

    u, slope = mean_velocity_and_slope(model, x, t, r, condition, v, tangent_width=width)
    assert u.requires_grad
    assert not slope.requires_grad
    plain = model(x, t, r, condition, tangent_width=width)
    with torch.no_grad():
        _, expected = torch.func.jvp(
            lambda a, b: model(a, b, r, condition, tangent_width=width),
            (x, t),
            (v, torch.ones_like(t)),
        )
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(u, slope), gradients(plain, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def meanflow_task(source: MovingDigits, **settings: object) -> MeanFlowTask:
    teacher = small_dit(source, guidance_embed=True)
    student = DiT.from_teacher(teacher, mean_flow=True)
    student.requires_grad_(True)
    values = {"steps": 1, "batch": 4, **settings}
    return MeanFlowTask("mf", student, teacher, source, MeanFlowStage(**values))


def test_frozen_teacher_gets_no_gradient(source: MovingDigits) -> None:
    task = meanflow_task(source)
    task.model.train()
    task.compute("model", 0, 0, generator()).loss.backward()
    assert not task.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert sum(float(p.grad.abs().sum()) for p in task.model.parameters() if p.grad is not None) > 0


def test_student_starts_at_the_teacher(source: MovingDigits) -> None:
    output = meanflow_task(source, equal_fraction=1.0).compute("model", 0, 0, generator())
    assert float(output.loss.detach()) < 1e-10
    assert output.logs["correction_rms"] < 1e-5
    assert output.logs["slope_rms"] > 1e-2


def test_restriction_reaches_the_task(source: MovingDigits) -> None:
    output = meanflow_task(source, restriction=0.1, batch=64).compute("model", 0, 0, generator())
    assert float((output.t - output.r).max()) <= 0.1 + 1e-6


def test_interval_width_is_half_the_interval(source: MovingDigits) -> None:
    task = meanflow_task(source, tangent_width="interval")
    output = task.compute("model", 0, 0, generator())
    batch = draw_batch(source, 4, generator(), guidance=(1.0, 8.0))
    x_t = interpolate(batch.x0, batch.noise, output.t)
    _, slope = mean_velocity_and_slope(
        task.model,
        x_t,
        output.t,
        output.r,
        batch.condition,
        output.tensors["teacher velocity"],
        tangent_width=(output.t - output.r) / 2,
    )
    torch.testing.assert_close(output.tensors["du/dt"], slope)
    other = meanflow_task(source, tangent_width=0.0).compute("model", 0, 0, generator())
    assert not torch.allclose(other.tensors["du/dt"], slope)


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"correction_clip": 0.01}, lambda a, b: b.logs["correction_rms"] <= 0.01001),
        ({"tangent_clip": 0.01}, lambda a, b: b.logs["correction_rms"] < a.logs["correction_rms"]),
        ({"tangent_warmup": 10}, lambda a, b: b.logs["correction_rms"] == 0),
        (
            {"tangent_normalise": 0.1},
            lambda a, b: float(b.loss.detach()) < 1 / b.tensors["u"][0].numel(),
        ),
        ({"adaptive_power": 1.0}, lambda a, b: 0 < float(b.loss.detach()) < 1),
        (
            {"velocity": "data"},
            lambda a, b: (
                not torch.equal(a.tensors["teacher velocity"], b.tensors["teacher velocity"])
            ),
        ),
    ],
)
def test_options_change_the_target(source: MovingDigits, settings: dict, check) -> None:
    plain = meanflow_task(source).compute("model", 0, 0, generator())
    changed = meanflow_task(source, **settings).compute("model", 0, 0, generator())
    assert torch.equal(plain.t, changed.t)
    assert check(plain, changed)


def test_ema_target_uses_the_averaged_weights(source: MovingDigits) -> None:
    task = meanflow_task(source, ema_target=True, optimizer=OptimizerConfig(ema=0.9))
    averaged = DiT.from_teacher(task.teacher, mean_flow=True)
    task.use_averaged({"model": averaged})
    with torch.no_grad():
        task.model.final_layer.linear.weight.mul_(2)
    output = task.compute("model", 0, 0, generator())
    reference = meanflow_task(source).compute("model", 0, 0, generator())
    torch.testing.assert_close(output.tensors["du/dt"], reference.tensors["du/dt"])
    assert not torch.allclose(output.tensors["u"], reference.tensors["u"])
    output.loss.backward()
    assert all(p.grad is None for p in averaged.parameters())


def test_sample_error_is_float32_at_least() -> None:
    a = torch.full((2, 3), 300.0, dtype=torch.float16)
    assert sample_error(a, torch.zeros_like(a)).tolist() == [90000.0, 90000.0]
