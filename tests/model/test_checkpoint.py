# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: atomic, exact, and refused with a clear line when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from disca.distill import checkpoint as ckpt
from disca.errors import UserError


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a/x": torch.randn(3, 5, generator=generator)[:, ::2],
        "a/half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "b/step": torch.tensor(3.0),
        "b/count": torch.tensor(5),
        "b/empty": torch.empty(0, 4),
        "b/double": torch.randn(2, generator=generator, dtype=torch.float64),
    }
    ckpt.write_tensors(path, tensors, {"step": 7, "config": {"lr": 0.1}})
    saved = ckpt.load_tensors(path)
    assert saved.metadata == {"step": 7, "config": {"lr": 0.1}}
    assert saved.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert saved.tensors[name].dtype == value.dtype
        assert torch.equal(saved.tensors[name], value)
    assert set(saved.section("a")) == {"x", "half"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "c.safetensors"
    ckpt.write_tensors(path, {"x": torch.zeros(3)}, {"step": 1})

    def fail(*args: object) -> None:
        raise OSError("disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(OSError, match="disk is gone"):
            ckpt.write_tensors(path, {"x": torch.ones(3)}, {"step": 2})
    assert ckpt.load_tensors(path).metadata["step"] == 1
    ckpt.write_tensors(path, {"x": torch.ones(3)}, {"step": 2})
    assert ckpt.load_tensors(path).metadata["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "c.safetensors"
    ckpt.write_tensors(path, {"x": torch.zeros(30)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"c\.safetensors: not a whole safetensors file"):
        ckpt.load_tensors(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors: no such checkpoint"):
        ckpt.load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, r"file: lacks tensor 'bias'"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "gain": torch.zeros(2)},
            r"has the unknown tensor 'gain'",
        ),
        (
            {"weight": torch.zeros(3, 3), "bias": torch.zeros(2)},
            r"tensor 'weight' has shape \[3, 3\].*needs \[2, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ckpt.load_module(nn.Linear(3, 2), tensors, "file")


def test_optimiser_state_round_trip() -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.arange(3.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = made()
    step(module, optimizer)
    state = {k: v.clone() for k, v in ckpt.optimizer_tensors(optimizer, module).items()}
    assert set(state) == {
        f"{p}/{k}" for p in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")
    }
    other, restored = made()
    other.load_state_dict(module.state_dict())
    ckpt.restore_optimizer([restored], other, state, "file")
    step(module, optimizer)
    step(other, restored)
    assert torch.equal(module.weight, other.weight)


@pytest.mark.parametrize(
    "state", [{"gain/exp_avg": torch.zeros(2)}, {"weight/exp_avg": torch.zeros(2, 2)}]
)
def test_foreign_optimiser_state_is_refused(state: dict[str, torch.Tensor]) -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(UserError, match="fits no parameter"):
        ckpt.restore_optimizer([torch.optim.AdamW(module.parameters())], module, state, "file")


def test_hash_ignores_key_order_and_sees_values() -> None:
    assert ckpt.config_hash({"a": 1, "b": [1, 2]}) == ckpt.config_hash({"b": [1, 2], "a": 1})
    assert ckpt.config_hash({"a": 1}) != ckpt.config_hash({"a": 2})


def test_differing_fields_are_listed_by_path() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": [1], "gone": 3}
    new = {"a": {"b": 1, "c": 5}, "d": [1], "new": 4}
    assert ckpt.differing_fields(old, new) == [
        "a.c: 2 -> 5",
        "gone: 3 -> absent",
        "new: absent -> 4",
    ]


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "done.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"done\.json: damaged"):
        ckpt.read_json(path)
