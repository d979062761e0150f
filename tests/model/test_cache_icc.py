# SPDX-License-Identifier: Apache-2.0
"""ICC: its low-rank factors, a skipped step by hand, and which layers it replaces."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from disca.cache.calibration import Calibration, calibrate
from disca.cache.icc import Icc, TokenLinears, weighted_factors
from disca.compare.flops import count_flops
from disca.errors import UserError
from tests.model.cache_hosts import LAYOUTS, TableBlock, TableHost, sample, tiny_case, uniform

LAYOUT = pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())


class LinearBlock(nn.Module):
    """Tokens plus two linear layers of them, and one of a vector that is left alone."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.vector = nn.Linear(1, 1)

    def forward(self, state):
        shift = self.vector(state.vec).unsqueeze(-1)
        hidden = torch.tanh(F.linear(state.tokens, self.first.weight))
        return state.with_tokens(state.tokens + self.second(hidden) + shift)


class ChannelHost(TableHost):
    """Tokens are the four channels of a pixel; the velocity is the video tokens."""

    def embed(self, x, t, r, cond):
        state = super().embed(x[:, :1], t, r, cond)
        video = x.flatten(2).transpose(1, 2)
        return state.with_tokens(torch.cat([video, torch.zeros_like(video[:, :1])], dim=1))

    def head(self, state):
        return state.video.transpose(1, 2).reshape(-1, 4, *state.grid)


def channel_host(rank=None):
    """Layers 4 -> 6 -> 4; of one rank if it is given."""
    generator = torch.Generator().manual_seed(3)
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
    with torch.no_grad():
        for layer in (first, second):
            rows, columns = layer.weight.shape
            inner = rank or min(rows, columns)
            left = torch.randn(rows, inner, generator=generator)
            right = torch.randn(inner, columns, generator=generator)
            layer.weight.copy_(left @ right / inner)
    return ChannelHost(LinearBlock(first, second)).eval()


def pixels(batch=2, seed=0):
    return torch.randn(batch, 4, 2, 1, 2, generator=torch.Generator().manual_seed(seed))


def sizes_by_hand(values):
    """Sizes of channels: mean of |x| over tokens, scaled to (0, 1], over clips and steps."""
    means = torch.cat([value.abs().mean(1) for value in values])
    low, high = means.min(1, keepdim=True).values, means.max(1, keepdim=True).values
    return ((means - low + 1e-6) / (high - low + 1e-6)).sum(0)


def product_by_hand(weight, left, right, rank):
    """``S_L^-1 SVD_rank(S_L W S_R) S_R^-1`` with whole matrices."""
    s_l, s_r = (
        torch.diag((size.sqrt() / size.sqrt().max()).clamp(min=1e-3)) for size in (left, right)
    )
    u, s, v = torch.linalg.svd(s_l @ weight @ s_r)
    low = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    return torch.linalg.inv(s_l) @ low @ torch.linalg.inv(s_r)


@pytest.mark.parametrize("statistics", ["values", "increments"])
def test_icc_fit_and_a_skipped_step_by_hand(statistics):
    host, x = channel_host(), pixels()
    block, times = host.blocks[0], uniform(3)
    fit = calibrate("icc", host, times, [(x, None)])
    plain = sample(host, "none", x, times)
    with torch.no_grad():
        inputs = [
            host.embed(value, t.expand(2), None, None).tokens
            for value, t in zip([x, *plain.trajectory], times, strict=True)
        ][:3]
        values = {"x1": inputs, "y1": [F.linear(value, block.first.weight) for value in inputs]}
        values["x2"] = [torch.tanh(value) for value in values["y1"]]
        values["y2"] = [block.second(value) for value in values["x2"]]
        if statistics == "increments":
            values = {k: [b - a for a, b in pairwise(v)] for k, v in values.items()}
        sizes = {name: sizes_by_hand(value) for name, value in values.items()}
        low1 = product_by_hand(block.first.weight, sizes["y1"], sizes["x1"], 1)
        low2 = product_by_hand(block.second.weight, sizes["y2"], sizes["x2"], 1)

        result = sample(host, Icc(2, rank=1, statistics=statistics, calibration=fit), x, times)
        before, now = inputs[0], host.embed(plain.trajectory[0], times[1].expand(2), None, None)
        y1 = F.linear(before, block.first.weight)
        hidden = torch.tanh(y1 + (now.tokens - before) @ low1.T)
        y2 = block.second(torch.tanh(y1)) + (hidden - torch.tanh(y1)) @ low2.T
        out = now.tokens + y2 + block.vector(now.vec).unsqueeze(-1)
        x1 = plain.trajectory[0]
        expected = x1 - (times[1] - times[2]) * host.head(now.with_tokens(out))
    assert result.report.computed == (0, 2)
    torch.testing.assert_close(result.trajectory[1], expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain.trajectory[1]).abs().max() > 1e-3
    assert result.report.hooked == ("linear layer 0", "linear layer 1")
    # inputs of 4 and 6 channels, outputs of 6 and 4; two clips of five tokens, the text token too
    assert result.report.cache_bytes == 2 * 5 * (4 + 6 + 6 + 4) * 4


def test_icc_is_exact_for_weights_of_its_rank():
    host, x = channel_host(rank=1), pixels()
    fit = calibrate("icc", host, uniform(6), [(pixels(seed=1), None), (pixels(1, seed=2), None)])
    result = sample(host, Icc(3, rank=1, calibration=fit), x, uniform(6))
    assert result.report.computed == (0, 3)
    torch.testing.assert_close(
        result.x, sample(host, "none", x, uniform(6)).x, rtol=1e-4, atol=1e-4
    )


def test_icc_costs_the_factors_at_a_skipped_step():
    """Ten tokens through 4 x 6 and 6 x 4, then through 4 x 1 x 6 and 6 x 1 x 4; a 1 x 1 layer."""
    host, x = channel_host(), pixels()
    policy = Icc(2, rank=1, calibration=calibrate("icc", host, uniform(2), [(x, None)]))
    whole, low_rank, vector = 10 * (24 + 24), 10 * (10 + 10), 2
    counted = count_flops(lambda: sample(host, policy, x, uniform(2)))
    assert counted == 2 * (whole + low_rank + 2 * vector)


def test_layers_of_tokens_are_found_by_their_input():
    weight, tokens = torch.ones(2, 3), torch.ones(1, 4, 3)
    seen = []

    def replace(number, x, layer_weight, layer):
        seen.append((number, x, layer_weight))
        return 2 * layer()

    with TokenLinears(replace) as layers:
        doubled = F.linear(input=tokens, weight=weight, bias=torch.ones(2))
        plain = F.linear(tokens[0], weight)
    assert doubled.tolist() == [[[8.0, 8.0]] * 4]
    assert plain.tolist() == [[3.0, 3.0]] * 4
    assert layers.calls == 1
    assert [number for number, _, _ in seen] == [0]
    assert seen[0][1] is tokens
    assert seen[0][2] is weight


def test_weighted_factors_keep_the_channels_that_are_large():
    """diag(3, 1) for inputs of sizes 1 and 100 (scales 0.1 and 1): the second channel is kept."""
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    left, right, share = weighted_factors(weight, torch.ones(2), torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([0.0, 1.0])))
    assert share.tolist() == pytest.approx([1 / 1.3])
    left, right, _ = weighted_factors(weight, torch.ones(2), torch.ones(2))
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([3.0, 0.0])))


@pytest.mark.parametrize(
    ("shape", "rank"), [((6, 4), 2), ((4, 4), 1), ((1, 1), 1), ((300, 300), 128)]
)
def test_factors_never_cost_as_much_as_the_weight(shape, rank):
    """The largest r with r (I + O) < I O: 20 < 24, 8 < 16; at most 128 and at least 1."""
    torch.manual_seed(0)
    left, right, share = weighted_factors(torch.randn(shape), *map(torch.ones, shape))
    assert (left.shape, right.shape, share.shape) == ((shape[0], rank), (rank, shape[1]), (rank,))


def test_icc_refuses_settings_hosts_and_runs():
    host, x = channel_host(), pixels()
    fit = calibrate("icc", host, uniform(4), [(x, None)])
    for rank in (0, 129):
        with pytest.raises(UserError, match=f"ranks from 1 to 128, got {rank}"):
            Icc(2, rank=rank, calibration=fit)
    with pytest.raises(UserError, match="one of values, increments, got 'fisher'"):
        Icc(2, statistics="fisher", calibration=fit)
    with pytest.raises(UserError, match="an interval of 1 computes every step"):
        Icc(1, calibration=fit)
    with pytest.raises(UserError, match=r"rank 3 costs as much as every layer .* at most 2"):
        sample(host, Icc(2, rank=3, calibration=fit), x, uniform(4))
    with pytest.raises(UserError, match="the blocks of the host call none"):
        calibrate("icc", TableHost(TableBlock(float, float)), uniform(4), [(x[:, :1], None)])
    fewer = {name: tensor for name, tensor in fit.tensors.items() if ".1." not in name}
    other = Calibration("icc", fit.schedule, fit.shape, fit.host, fewer)
    with pytest.raises(UserError, match="has 1 linear layers of tokens, this run called 2"):
        sample(host, Icc(2, rank=1, calibration=other), x, uniform(4))


def test_icc_summary():
    host = channel_host(rank=1)
    lines = Icc.summary(calibrate("icc", host, uniform(3), [(pixels(), None)]).tensors)
    assert lines[0] == "2 linear layers of tokens"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "singular values with values",
        "singular values with increments",
    ]


LINEARS = {"1.0": 2 * 8 + 2 * 3, "1.5": 3 * 8}
"""Double-stream blocks have four linear layers a stream, single-stream ones three."""


@LAYOUT
def test_icc_hooks_every_linear_layer_of_tokens(config, request):
    host, x, cond = tiny_case(config)
    fit = calibrate("icc", host, uniform(4), [(x, cond)])
    report = sample(host, Icc(2, rank=4, calibration=fit), x, uniform(4), cond).report
    assert len(report.hooked) == LINEARS[request.node.callspec.id[:3]]
    assert report.computed == (0, 2)
    if config.single_blocks:
        # Floats of a token: in a double block 24 + 72, 24 + 24, 24 + 48, 48 + 24; in a single block
        # 24 + 72 and 48 of the same input, then 72 + 24. Two clips of 8 + 3 tokens, float32.
        assert report.cache_bytes == 2 * 11 * (2 * 288 + 2 * 240) * 4
