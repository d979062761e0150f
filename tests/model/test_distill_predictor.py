# SPDX-License-Identifier: Apache-2.0
"""The predictor stage: times, hinge losses, who gets gradients, what the cache is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disca.data.digits import MovingDigits
from disca.distill.batch import draw_batch, interpolate, sample_error
from disca.distill.config import PredictorStage
from disca.distill.predictor import (
    PredictorTask,
    discriminator_hinge,
    generator_hinge,
    one_step,
    schedule_gaps,
    shifted_pair,
)
from disca.distill.trainer import StepOutput
from disca.distill.trajectories import record_trajectories
from disca.errors import UserError
from disca.models.configs import DiTConfig
from disca.models.discriminator import Discriminator
from disca.models.dit import DiT
from disca.models.predictor import Predictor
from disca.sample.samplers import mean_velocity
from disca.sample.schedule import flow_shift_schedule


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source() -> MovingDigits:
    return MovingDigits(frames=4, size=8, starts="free")


def make_task(source: MovingDigits, *, mean_flow: bool = True, **settings: Any) -> PredictorTask:
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
        guidance_embed=True,
        mean_flow=mean_flow,
    )
    stage = PredictorStage(**{"steps": 4, "mse_steps": 2, "batch": 4, **settings})
    torch.manual_seed(0)
    host = DiT(config)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    predictor = Predictor(config, form=stage.form)
    return PredictorTask("predictor", predictor, Discriminator(config), host, source, stage)


# Functions.


def test_shifted_pair_keeps_the_length_until_it_meets_zero() -> None:
    t, r = torch.tensor([0.9, 0.3, 0.1]), torch.tensor([0.8, 0.1, 0.0])
    later = shifted_pair(t, r, torch.tensor([0.2, 0.2, 0.2]))
    torch.testing.assert_close(later[0], torch.tensor([0.7, 0.1, 0.0]))
    torch.testing.assert_close(later[1], torch.tensor([0.6, 0.0, 0.0]))


def test_gaps_of_the_published_list() -> None:
    """The twelve gaps of n4 at shift 5, computed by hand from t = 5 s / (1 + 4 s)."""
    rows = schedule_gaps(["n4"], 20, 5.0)
    assert rows.shape == (12, 4)
    gaps = (rows[:, 0] - rows[:, 2]).tolist()
    expected = [0.012, 0.026, 0.016, 0.035, 0.055, 0.026, 0.056, 0.090, 0.047, 0.104, 0.174, 0.112]
    assert gaps == pytest.approx(expected, abs=6e-4)
    assert bool((rows[:, 0] > rows[:, 1]).all())
    assert bool((rows[:, 1] >= rows[:, 2]).all())
    assert bool((rows[:, 2] > rows[:, 3]).all())


def test_gaps_of_an_interval() -> None:
    rows = schedule_gaps(["every:2"], 4, 1.0)
    expected = [[1.0, 0.75, 0.75, 0.5], [0.5, 0.25, 0.25, 0.0]]
    torch.testing.assert_close(rows, torch.tensor(expected))
    assert schedule_gaps(["every:2", "every:4"], 4, 1.0).shape == (5, 4)
    with pytest.raises(UserError, match="n4"):
        schedule_gaps(["n4"], 10, 5.0)


def test_one_step_by_hand() -> None:
    x, u = torch.ones(2, 1, 1, 1, 1), torch.full((2, 1, 1, 1, 1), 2.0)
    out = one_step(x, u, torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]))
    assert out.flatten().tolist() == [0.0, 1.0]


def test_hinge_losses_by_hand() -> None:
    """Eq. 7 rewards D for real above 1 and fake below -1; Eq. 8 rewards P for fake above 1."""
    good = discriminator_hinge([torch.tensor([2.0, 1.5])], [torch.tensor([-1.0, -3.0])])
    swapped = discriminator_hinge([torch.tensor([-1.0, -3.0])], [torch.tensor([2.0, 1.5])])
    assert good.item() == 0.0
    assert swapped.item() == pytest.approx((2 + 4) / 2 + (3 + 2.5) / 2)
    heads = discriminator_hinge([torch.zeros(2), torch.ones(3)], [torch.zeros(2), -torch.ones(3)])
    assert heads.item() == pytest.approx((2.0 + 0.0) / 2)
    assert generator_hinge([torch.tensor([2.0, 0.5]), torch.tensor([-1.0])]).item() == (
        pytest.approx((0.25 + 2.0) / 2)
    )


# The task.


def test_phases_alternate_after_the_regression(source: MovingDigits) -> None:
    task = make_task(source)
    assert [task.phases(step) for step in range(4)] == [
        ("predictor",),
        ("predictor",),
        ("predictor", "discriminator"),
        ("predictor", "discriminator"),
    ]
    task.discriminator = None
    assert task.phases(3) == ("predictor",)


@pytest.mark.parametrize("delta", ["uniform", "schedule"])
def test_times_of_the_pairs(source: MovingDigits, delta: str) -> None:
    task = make_task(source, batch=500, delta=delta)
    t, r, t_later, r_later = task.times(generator())
    assert bool((t >= r).all())
    assert bool((t_later >= r_later).all())
    assert float((t - t_later).max()) <= 0.2
    if delta == "uniform":
        assert float((t - r).max()) <= 0.2 + 1e-6
        inside = r_later > 0
        torch.testing.assert_close((t - r)[inside], (t_later - r_later)[inside], atol=1e-6, rtol=0)
    else:
        known = {tuple(row) for row in task.gaps.tolist()}
        drawn = torch.stack([t, r, t_later, r_later], dim=1).tolist()
        assert {tuple(row) for row in drawn} <= known


def test_regression_loss_by_hand(source: MovingDigits) -> None:
    task = make_task(source)
    output = task.compute("predictor", 0, 0, generator())
    g = generator()
    batch = draw_batch(source, 4, g, guidance=(1.0, 8.0))
    t, r, t_later, r_later = task.times(g)
    x = interpolate(batch.x0, batch.noise, t)
    x_later = interpolate(batch.x0, batch.noise, t_later)
    with torch.no_grad():
        cache = task.host.run(task.host.embed(x, t, r, batch.condition)).tokens
        target = task.host(x_later, t_later, r_later, batch.condition)
        state = task.host.embed(x_later, t_later, r_later, batch.condition)
        predicted = task.host.head(state.with_tokens(task.predictor(state, cache)))
    torch.testing.assert_close(output.per_sample, sample_error(predicted, target))
    torch.testing.assert_close(output.loss.detach(), output.per_sample.mean())
    assert "gan" not in output.logs


def backward(output: StepOutput) -> None:
    torch.autograd.backward(output.loss)


def gradient(module: torch.nn.Module) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return float(sum(g.abs().sum() for g in grads)) if grads else 0.0


def test_gradients_reach_only_the_phase_that_is_updated(source: MovingDigits) -> None:
    task = make_task(source)
    assert task.discriminator is not None
    assert not task.host.training
    output = task.compute("predictor", 2, 0, generator())
    backward(output)
    assert gradient(task.predictor) > 0
    assert gradient(task.discriminator) == 0
    task.predictor.zero_grad(set_to_none=True)
    backward(task.compute("discriminator", 2, 0, generator()))
    assert gradient(task.discriminator) > 0
    assert gradient(task.predictor) == 0
    assert all(p.grad is None and not p.requires_grad for p in task.host.parameters())


def test_gan_term_moves_the_predictor(source: MovingDigits) -> None:
    grads = []
    for weight in (0.0, 1.0):
        task = make_task(source, gan_weight=weight)
        output = task.compute("predictor", 2, 0, generator())
        backward(output)
        grads.append([p.grad.clone() for p in task.predictor.parameters() if p.grad is not None])
        expected = output.logs["mse"] + weight * output.logs["gan"]
        assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_mse_only_the_gan_term_counts(source: MovingDigits) -> None:
    task = make_task(source, mse_weight=0.0, mse_steps=0, gan_weight=0.5)
    output = task.compute("predictor", 0, 0, generator())
    backward(output)
    assert output.logs["mse"] > 0
    assert float(output.loss.detach()) == pytest.approx(0.5 * output.logs["gan"], rel=1e-6)
    assert gradient(task.predictor) > 0


def test_discriminator_judges_the_latents_of_the_same_step(source: MovingDigits) -> None:
    task = make_task(source)
    first = task.compute("predictor", 2, 0, generator())
    second = task.compute("discriminator", 2, 0, generator(1))
    assert torch.equal(second.t, first.t)
    real, fake = second.tensors["real latent"], second.tensors["fake latent"]
    step = (first.t - first.r).view(-1, 1, 1, 1, 1)
    difference = step * (first.tensors["target"] - first.tensors["predicted"])
    torch.testing.assert_close(fake - real, difference, atol=1e-5, rtol=1e-4)
    with pytest.raises(KeyError):
        task.compute("discriminator", 2, 0, generator())


def test_residual_form_starts_at_reuse(source: MovingDigits) -> None:
    logs = make_task(source, form="residual").compute("predictor", 0, 0, generator()).logs
    assert logs["mse"] == pytest.approx(logs["reuse_mse"], rel=1e-5)
    logs = make_task(source, form="paper").compute("predictor", 0, 0, generator()).logs
    assert logs["mse"] != pytest.approx(logs["reuse_mse"], rel=1e-2)


def test_student_points_lie_on_its_trajectory(source: MovingDigits) -> None:
    line = make_task(source).compute("predictor", 0, 0, generator())
    task = make_task(source, points="student")
    student = task.compute("predictor", 0, 0, generator())
    assert torch.equal(line.tensors["cache"], student.tensors["cache"])
    g = generator()
    batch = draw_batch(source, 4, g, guidance=(1.0, 8.0))
    t, _, t_later, r_later = task.times(g)
    x = interpolate(batch.x0, batch.noise, t)
    with torch.no_grad():
        u = task.host(x, t, t_later, batch.condition)
        x_later = one_step(x, u, t, t_later)
        target = task.host(x_later, t_later, r_later, batch.condition)
    torch.testing.assert_close(student.tensors["target"], target)
    assert not torch.allclose(line.tensors["target"], target)


def test_host_without_an_end_time(source: MovingDigits) -> None:
    task = make_task(source, mean_flow=False)
    backward(task.compute("predictor", 2, 0, generator()))
    assert float(task.compute("discriminator", 2, 0, generator()).loss.detach()) > 0


# The student's own trajectories.

RECORDED = {
    "points": "trajectory",
    "delta": "schedule",
    "schedule_steps": 5,
    "schedule_shift": 3.0,
    "schedule_lists": ["0,2,4"],
    "trajectories": 6,
    "refresh": 2,
    "guidance": (2.0, 4.0),
}


def test_recorded_trajectories_are_those_of_the_sampler(source: MovingDigits) -> None:
    task = make_task(source, **RECORDED)
    schedule = flow_shift_schedule(5, 3.0)
    bank = record_trajectories(
        task.host, source, schedule, 5, generator(1), guidance=(2.0, 4.0), batch=2
    )
    assert len(bank) == 5
    with torch.no_grad():
        end = mean_velocity(lambda x, t, r: task.host(x, t, r, bank.condition), bank.x[0], schedule)
        state = task.host.embed(
            bank.x[3], schedule[3].expand(5), schedule[4].expand(5), bank.condition
        )
        tokens = task.host.run(state).tokens
    last = one_step(bank.x[4], bank.velocity[4], schedule[4].expand(5), schedule[5].expand(5))
    torch.testing.assert_close(last, end)
    torch.testing.assert_close(bank.tokens[3], tokens)


def test_recorded_draws_pair_each_prediction_with_its_cached_step(source: MovingDigits) -> None:
    task = make_task(source, **RECORDED)
    schedule = flow_shift_schedule(5, 3.0)
    drawn = task._draw(0, generator(3))
    assert task.pairs.tolist() == [[0, 1], [2, 3]]
    assert task._bank is not None
    bank = task._bank[1]
    for row in range(4):
        step = int((schedule == drawn.t[row]).nonzero())
        assert float(drawn.r[row]) == float(schedule[step + 1])
        run = int((bank.x[step] == drawn.x[row]).flatten(1).all(1).nonzero())
        assert torch.equal(drawn.cache[row], bank.tokens[step - 1, run])
        assert torch.equal(drawn.target[row], bank.velocity[step, run])
        assert float(drawn.condition.guidance[row]) == float(bank.condition.guidance[run])


def test_recorded_trajectories_depend_on_the_turn_alone(source: MovingDigits) -> None:
    """A run that resumes in the middle of a turn records what the undisturbed one recorded."""
    whole, resumed = make_task(source, **RECORDED), make_task(source, **RECORDED)
    drawn = [whole._draw(step, generator(step)) for step in range(4)]
    late = resumed._draw(3, generator(3))
    assert torch.equal(late.x, drawn[3].x)
    assert torch.equal(late.cache, drawn[3].cache)
    assert whole._bank is not None
    assert whole._bank[0] == 1


def test_recorded_trajectories_need_the_schedule() -> None:
    with pytest.raises(ValueError, match="delta: schedule"):
        PredictorStage(points="trajectory", delta="uniform")


def test_step_power_weights_by_the_length_of_the_step(source: MovingDigits) -> None:
    output = {p: make_task(source, step_power=p, **RECORDED) for p in (0.0, 2.0)}
    plain, weighted = (task.compute("predictor", 0, 0, generator(5)) for task in output.values())
    weight = (plain.t - plain.r).square()
    assert float(plain.loss) == pytest.approx(float(plain.per_sample.mean()), rel=1e-5)
    expected = (weight / weight.mean() * plain.per_sample).mean()
    assert float(weighted.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(weighted.loss) != pytest.approx(float(plain.loss), rel=1e-3)
