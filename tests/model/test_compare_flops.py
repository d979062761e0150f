# SPDX-License-Identifier: Apache-2.0
"""The operation counter against PyTorch's, and against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import disca_kernels
from disca.compare.flops import count_flops
from disca.models import Condition, DiT, DiTConfig


def aten_flops(call):
    """What reaches ATen, with every fused kernel replaced by matrix products."""
    with (
        torch.no_grad(),
        disca_kernels.use_backend("eager"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        call()
    return counter.get_total_flops()


def test_by_hand():
    x = torch.randn(3, 5, 7)
    layer = nn.Linear(7, 11)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 5 * 7 * 11
    assert count_flops(lambda: x @ torch.randn(7, 2)) == 2 * 3 * 5 * 7 * 2
    assert count_flops(lambda: torch.bmm(x, torch.randn(3, 7, 4))) == 2 * 3 * 5 * 7 * 4
    conv = nn.Conv3d(2, 6, (1, 2, 2))
    assert count_flops(lambda: conv(torch.randn(1, 2, 3, 4, 4))) == 2 * 6 * 3 * 3 * 3 * (2 * 4)


def test_linear_by_keyword():
    x, weight = torch.randn(3, 5, 7), torch.randn(11, 7)
    assert count_flops(lambda: F.linear(input=x, weight=weight)) == 2 * 3 * 5 * 7 * 11


def test_blocks_by_hand():
    """Two parallel blocks over 2 * 2 * 2 patches and 4 text tokens, term by term."""
    batch, tokens, width, heads, inner = 3, 12, 48, 2, 192
    config = DiTConfig(
        in_channels=1,
        out_channels=1,
        patch=(2, 4, 4),
        hidden=width,
        heads=heads,
        rope_dims=(8, 8, 8),
        double_blocks=0,
        single_blocks=2,
        mlp_ratio=inner / width,
        text_dim=7,
        text_refiner_depth=0,
        pooled_dim=None,
        time_features=16,
    )
    host = DiT(config)
    cond = Condition(torch.randn(batch, 4, 7), torch.tensor([1, 4, 2]))
    state = host.embed(torch.randn(batch, 1, 4, 8, 8), torch.rand(batch), None, cond)
    modulation = 2 * batch * width * 3 * width
    into = 2 * batch * tokens * width * (3 * width + inner)  # q, k, v and the MLP's first layer
    attention = 4 * batch * heads * tokens**2 * (width // heads)  # all keys, padding too
    out = 2 * batch * tokens * (width + inner) * width
    assert count_flops(lambda: host.run(state)) == 2 * (modulation + into + attention + out)


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, disca_kernels.attention])
def test_attention_by_hand(attention):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 9, 9))
    count = count_flops(lambda: attention(q, k, v))
    assert count == 4 * 2 * 3 * 5 * 9 * 8
    assert count == aten_flops(lambda: attention(q, k, v))


@pytest.mark.parametrize("mean_flow", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 2), (0, 3), (2, 0)])
def test_dit(double, single, mean_flow):
    config = DiTConfig(
        in_channels=1,
        out_channels=1,
        patch=(2, 4, 4),
        hidden=48,
        heads=2,
        rope_dims=(8, 8, 8),
        double_blocks=double,
        single_blocks=single,
        text_dim=7,
        text_refiner_depth=0,
        pooled_dim=7,
        time_features=16,
        mean_flow=mean_flow,
    )
    host = DiT(config)
    x, t = torch.randn(3, 1, 4, 8, 8), torch.rand(3)
    cond = Condition(torch.randn(3, 4, 7), torch.tensor([1, 4, 2]), torch.randn(3, 7))

    def call():
        host(x, t, t if mean_flow else None, cond)

    count = count_flops(call)
    assert count == aten_flops(call)
    blocks = count_flops(lambda: host.run(host.embed(x, t, t if mean_flow else None, cond)))
    assert 0 < blocks < count


def test_leaves_gradients_alone():
    layer = nn.Linear(3, 3)
    count_flops(lambda: layer(torch.randn(2, 3)))
    assert layer(torch.randn(2, 3)).requires_grad
