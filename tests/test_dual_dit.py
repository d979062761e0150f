# SPDX-License-Identifier: Apache-2.0
"""The forward-mode pass through the real video DiT, and beside the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disca_kernels import dual
from tests.dual_cases import live_saved
from tests.model.tiny import inputs, model


@pytest.fixture(scope="module")
def case():
    net = model(torch.float64, mean_flow=True)
    x, t, r, condition = inputs(net.config, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, r, cond=condition)

    return net, velocity, (x, t), (torch.randn_like(x), torch.ones_like(t))


def test_agrees_with_func_jvp(case):
    _, velocity, primals, tangents = case
    out, out_dot = dual.jvp(velocity, primals, tangents)
    expected, expected_dot = torch.func.jvp(velocity, primals, tangents)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out_dot, expected_dot.detach(), rtol=1e-9, atol=1e-9)


def test_gradient_and_memory_are_those_of_the_plain_forward(case):
    net, velocity, primals, tangents = case
    plain, kept_by_plain = live_saved(lambda: velocity(*primals))
    (out, out_dot), kept = live_saved(lambda: dual.jvp(velocity, primals, tangents))
    assert not out_dot.requires_grad
    assert kept == kept_by_plain
    parameters = [p for p in net.parameters() if p.requires_grad]
    got, expected = (
        torch.autograd.grad(value.square().sum(), parameters, allow_unused=True)
        for value in (out, plain)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outside", [False, True])
def test_compiled(outside):
    module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    x, x_dot = torch.randn(3, 4), torch.randn(3, 4)
    expected = dual.jvp(module, (x,), (x_dot,))
    compiled = torch.compile(module, backend="eager")
    compiled(x)

    def whole(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        return dual.jvp(module, (x,), (x_dot,))

    if outside:
        out = torch.compile(whole, backend="eager")(x, x_dot)
    else:
        out = dual.jvp(compiled, (x,), (x_dot,))
    torch.testing.assert_close(out, expected)
    assert out[0].requires_grad
    assert not out[1].requires_grad
