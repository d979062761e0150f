# SPDX-License-Identifier: Apache-2.0
"""The trainer on a toy regression: resume, accumulation, schedules, failures."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from disca.distill.checkpoint import load_tensors
from disca.distill.config import OptimizerConfig, TrainerConfig
from disca.distill.trainer import (
    Interrupted,
    NonFiniteError,
    StepOutput,
    Trainer,
    step_generator,
)
from disca.errors import UserError


class Toy:
    """Regression of a fixed linear map, with an optional accident or signal at one step."""

    name = "toy"

    def __init__(self, *, batch: int = 8, accident: str = "", at: int = 3, groups=("model",)):
        torch.manual_seed(0)
        self.modules = {
            g: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)) for g in groups
        }
        self.batch, self.accident, self.at = batch, accident, at
        self.seen: list[tuple[int, int, float]] = []

    def use_averaged(self, averaged):
        self.averaged = averaged

    def phases(self, step):
        return tuple(self.modules)

    def compute(self, phase, step, micro, generator):
        x = torch.randn(self.batch, 4, generator=generator)
        t = torch.rand(self.batch, generator=generator)
        self.seen.append((step, micro, float(x[0, 0])))
        y = self.modules[phase](x)
        target = torch.stack([x.sum(1), x[:, 0] - x[:, 1]], dim=1)
        errors = (y - target).square().mean(1)
        tensors = {"x": x, "y": y.detach()}
        if step == self.at:
            if self.accident == "loss":
                errors = errors * torch.where(torch.arange(self.batch) == 2, math.nan, 1.0)
                tensors["y"] = y.detach() * math.nan
            if self.accident == "gradient":
                errors = errors + torch.sqrt((y[:, 0] * 0).abs())
            if self.accident == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            if self.accident == "error":
                raise RuntimeError("power cut")
        return StepOutput(errors.mean(), errors.detach(), t, t, {"extra": 1.0}, tensors)


def make(folder: Path, task: Toy, *, identity=None, optimizer=None, **settings) -> Trainer:
    values = {"steps": 10, "checkpoint_every": 2, "tensorboard": False, "time_bins": 4}
    return Trainer(
        task,
        TrainerConfig(**{**values, **settings}),
        {g: optimizer or OptimizerConfig(lr=1e-2, schedule="cosine") for g in task.modules},
        folder,
        seed=1,
        identity=identity or {"stage": {"steps": 10}},
        progress=False,
    )


def weights(modules) -> dict[str, torch.Tensor]:
    return {f"{g}.{k}": v for g, m in modules.items() for k, v in m.state_dict().items()}


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def folders(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("groups", [("model",), ("predictor", "discriminator")])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_resume_is_exact(tmp_path: Path, groups: tuple[str, ...], at: int) -> None:
    whole, broken = folders(tmp_path, "whole", "broken")
    expected = weights(make(whole, Toy(groups=groups)).fit())
    with pytest.raises(RuntimeError, match="power cut"):
        make(broken, Toy(groups=groups, accident="error", at=at)).fit()
    assert_same(weights(make(broken, Toy(groups=groups)).fit()), expected)
    assert lines(broken) == lines(whole)
    assert [line["step"] for line in lines(broken)] == list(range(1, 11))
    saved = [load_tensors(f / "checkpoint.safetensors").tensors for f in (whole, broken)]
    assert_same(*saved)


def test_sigterm_writes_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    whole, stopped = folders(tmp_path, "whole", "stopped")
    expected = weights(make(whole, Toy(), checkpoint_every=100).fit())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as info:
        make(stopped, Toy(accident="sigterm", at=4), checkpoint_every=100).fit()
    assert info.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert load_tensors(stopped / "checkpoint.safetensors").metadata["step"] == 5
    task = Toy()
    assert_same(weights(make(stopped, task, checkpoint_every=100).fit()), expected)
    assert task.seen[0][0] == 5


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    folder, other = folders(tmp_path, "a", "b")

    class Split(Toy):
        """Micro-batches that are the halves of what `Toy` draws for micro-batch 0."""

        def compute(self, phase, step, micro, generator):
            return super().compute(phase, step, micro, step_generator(1, "toy", step, 0))

    optimizer = OptimizerConfig(lr=1e-2, ema=None)
    one = weights(make(folder, Toy(batch=16), optimizer=optimizer).fit())
    two = weights(make(other, Split(batch=16), accumulate=2, optimizer=optimizer).fit())
    for key, value in one.items():
        torch.testing.assert_close(two[key], value)


def test_randomness_is_a_function_of_the_arguments() -> None:
    draw = [
        torch.rand(3, generator=step_generator(*arguments))
        for arguments in [
            (0, "a", 0, 0),
            (1, "a", 0, 0),
            (0, "b", 0, 0),
            (0, "a", 1, 0),
            (0, "a", 0, 1),
        ]
    ]
    assert torch.equal(draw[0], torch.rand(3, generator=step_generator(0, "a", 0, 0)))
    for i in range(1, len(draw)):
        assert not torch.equal(draw[0], draw[i])


def test_loss_that_is_not_finite_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as info:
        make(tmp_path, Toy(accident="loss", at=5)).fit()
    message = str(info.value)
    assert "stage 'toy', step 6" in message
    assert "sample 2 (t=0." in message
    assert "tensor 'y'" in message
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert load_tensors(tmp_path / "checkpoint.safetensors").metadata["step"] == 4


def test_parameter_that_is_not_finite_is_named(tmp_path: Path) -> None:
    task = Toy()
    with torch.no_grad():
        task.modules["model"][2].weight[1, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"parameter '2\.weight'"):
        make(tmp_path, task).fit()


def test_gradient_that_is_not_finite_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 4: the gradient norm of 'model'.*0\.weight"):
        make(tmp_path, Toy(accident="gradient")).fit()


def test_gradient_is_clipped(tmp_path: Path) -> None:
    clipped, free = folders(tmp_path, "clipped", "free")
    tight = OptimizerConfig(lr=1e-2, clip=1e-8, eps=1.0, ema=None)
    start = weights(Toy().modules)
    end = weights(make(clipped, Toy(), optimizer=tight).fit())
    moved = max(float((end[k] - start[k]).abs().max()) for k in start)
    assert moved < 1e-8
    make(free, Toy(), optimizer=tight.model_copy(update={"clip": None})).fit()
    assert lines(clipped)[0]["grad_norm"] == lines(free)[0]["grad_norm"] > 0.1


def test_ema_follows_the_weights(tmp_path: Path) -> None:
    task = Toy()
    start = {k: v.clone() for k, v in weights(task.modules).items()}
    optimizer = OptimizerConfig(lr=1e-2, ema=0.5, ema_warmup=False)
    final = weights(make(tmp_path, task, steps=2, optimizer=optimizer).fit())
    saved = load_tensors(tmp_path / "checkpoint.safetensors").section("model/model")
    middle_folder = tmp_path / "one"
    middle_folder.mkdir()
    # The first update copies the weights, the second one averages.
    make(middle_folder, Toy(), steps=1, optimizer=optimizer).fit()
    first = load_tensors(middle_folder / "checkpoint.safetensors").section("model/model")
    for key, value in final.items():
        name = key.removeprefix("model.")
        torch.testing.assert_close(value, 0.5 * first[name] + 0.5 * saved[name])
        assert not torch.equal(value, start[key])


def test_log_holds_bins_and_rates(tmp_path: Path) -> None:
    make(tmp_path, Toy(batch=64)).fit()
    first = lines(tmp_path)[0]
    assert first["extra"] == 1.0
    assert len(first["loss_bins"]) == 4
    generator = step_generator(1, "toy", 0, 0)
    torch.randn(64, 4, generator=generator)
    share = torch.bincount((torch.rand(64, generator=generator) * 4).long(), minlength=4) / 64
    mean = sum(b * float(s) for b, s in zip(first["loss_bins"], share, strict=True))
    assert mean == pytest.approx(first["loss"], rel=1e-5)


def test_two_groups_are_logged_apart(tmp_path: Path) -> None:
    make(tmp_path, Toy(groups=("predictor", "discriminator"))).fit()
    first = lines(tmp_path)[0]
    assert {"loss", "grad_norm", "discriminator/loss", "discriminator/grad_norm"} <= first.keys()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_and_resumes(tmp_path: Path, precision: str) -> None:
    whole, broken = folders(tmp_path, "whole", "broken")
    expected = weights(make(whole, Toy(), precision=precision).fit())
    with pytest.raises(RuntimeError, match="power cut"):
        make(broken, Toy(accident="error", at=5), precision=precision).fit()
    assert_same(weights(make(broken, Toy(), precision=precision).fit()), expected)
    assert all(v.dtype == torch.float32 for v in expected.values())
    assert lines(whole)[-1]["loss"] < lines(whole)[0]["loss"]


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    make(tmp_path, Toy(), steps=2, tensorboard=True).fit()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_progress_bar_shows_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path, Toy())
    trainer.progress = True
    trainer.fit()
    shown = capsys.readouterr().err
    assert "toy" in shown
    assert "loss=" in shown


def test_other_configuration_is_refused(tmp_path: Path) -> None:
    make(tmp_path, Toy(), identity={"stage": {"lr": 0.1, "batch": 3}}).fit()
    with pytest.raises(UserError, match=r"stage\.lr: 0\.1 -> 0\.2.*delete"):
        make(tmp_path, Toy(), identity={"stage": {"lr": 0.2, "batch": 3}}).fit()


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.55), (12, 0.1), (20, 0.1)]
)
def test_cosine_schedule(step: int, expected: float) -> None:
    settings = OptimizerConfig(lr=1.0, schedule="cosine", warmup=4, final_lr=0.1)
    assert settings.lr * settings.lr_factor(step, 12) == pytest.approx(expected)


def test_constant_schedule() -> None:
    settings = OptimizerConfig(lr=0.3, warmup=2)
    assert [settings.lr * settings.lr_factor(s, 5) for s in range(4)] == pytest.approx(
        [0.15, 0.3, 0.3, 0.3]
    )


class BlockToy(Toy):
    """The toy with a matrix that is a transformer block's by name."""

    def __init__(self, **options):
        super().__init__(**options)
        net = nn.ModuleDict({"single_blocks": self.modules["model"]})
        net.forward = net["single_blocks"].forward
        self.modules = {"model": net}


def test_muon_trains_the_block_matrices_and_resumes_exactly(tmp_path: Path) -> None:
    settings = OptimizerConfig(lr=1e-2, muon_lr=2e-2, schedule="cosine")
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    for folder in (whole, halted):
        folder.mkdir()
    trainer = make(whole, BlockToy(), optimizer=settings)
    adamw, muon = trainer.groups["model"].optimizers
    assert [p.dim() for e in muon.param_groups for p in e["params"]] == [2, 2]
    assert all(p.dim() == 1 for e in adamw.param_groups for p in e["params"])
    expected = trainer.fit()["model"].state_dict()
    with pytest.raises(RuntimeError, match="power cut"):
        make(halted, BlockToy(accident="error", at=5), optimizer=settings).fit()
    found = make(halted, BlockToy(), optimizer=settings).fit()["model"].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
