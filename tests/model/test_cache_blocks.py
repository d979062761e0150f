# SPDX-License-Identifier: Apache-2.0
"""PAB, Δ-DiT, DeepCache and the first-block cache: which steps they skip and how."""

from __future__ import annotations

import pytest
import torch

from disca.cache import build_policy
from disca.errors import UserError
from tests.model.cache_hosts import (
    LAYOUTS,
    RESOURCES,
    TableBlock,
    TableHost,
    sample,
    tiny_case,
    uniform,
)

LAYOUT = pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())


def flat_host(blocks=2):
    """Blocks that add 8t·t by attention and 2t·t by the MLP."""
    return TableHost(*(TableBlock(lambda t: 8 * t, lambda t: 2 * t) for _ in range(blocks)))


def noise(batch=1):
    return torch.zeros(batch, 1, 2, 1, 2)


def refused(spec, message, *, host=None, steps=6):
    with pytest.raises(UserError, match=message):
        sample(host or flat_host(), spec, noise(), uniform(steps))


def first_step(host, x, cond, times):
    """The embedded input of step 0, and that of step 1 after a whole step 0."""
    t, r = (times[i].expand(len(x)) for i in (0, 1))
    embedded = host.embed(x, t, r if host.mean_flow else None, cond)
    velocity = host.head(host.run(embedded))
    x1 = x - (times[0] - times[1]) * velocity
    t, r = (times[i].expand(len(x)) for i in (1, 2))
    return embedded, x1, host.embed(x1, t, r if host.mean_flow else None, cond)


def assert_second_step(host, spec, x, cond, expected):
    """``expected(embedded_0, embedded_1)`` is the state before the head of the skipped step 1."""
    times = uniform(3)
    with torch.no_grad():
        before, x1, now = first_step(host, x, cond, times)
        x2 = x1 - (times[1] - times[2]) * host.head(expected(before, now))
        whole = x1 - (times[1] - times[2]) * host.head(host.run(now))
    result = sample(host, spec, x, times, cond)
    assert 1 in result.report.skipped
    torch.testing.assert_close(result.trajectory[1], x2, rtol=1e-5, atol=1e-5)
    assert (x2 - whole).abs().max() > 1e-3  # the formula is not that of a computed step
    return result


@LAYOUT
@pytest.mark.parametrize(
    "spec",
    [
        "pab:interval=3",
        "pab:interval=2,mlp_times=[1],mlp_blocks=[0,2]",
        "delta-dit:interval=3",
        "deepcache:interval=3",
        "first-block:threshold=1e9",
        "adacache:codebook={1e9: 3}",
    ],
)
def test_runs_on_both_layouts_and_forgets_the_last_run(config, spec):
    host, x, cond = tiny_case(config)
    policy = build_policy(spec, RESOURCES)
    weights = [parameter.clone() for parameter in host.parameters()]
    first = sample(host, policy, x, uniform(6), cond)
    again = sample(host, policy, x, uniform(6), cond)
    assert torch.equal(first.x, again.x)
    assert first.report == again.report
    assert all(map(torch.equal, weights, host.parameters()))
    plain = sample(host, "none", x, uniform(6), cond)
    assert torch.equal(first.trajectory[0], plain.trajectory[0]) or spec.startswith(
        ("pab", "adacache")  # sub-layer by sub-layer rounds otherwise than a whole block
    )
    assert (first.x - plain.x).abs().max() > 1e-3


# PAB


def test_pab_by_hand():
    """Kept attention passes through the gate of now; the MLP is computed."""
    # t = 1: 0 + 1·8 + 1·2 = 10, x = 0 − ½·10 = −5
    # t = ½: −5 + ½·8 (kept) + ½·1 = −½, x = −5 − ½·(−½) = −4.75
    result = sample(flat_host(1), "pab:interval=2", noise(), [1, 0.5, 0])
    assert result.trajectory[0].unique().tolist() == [-5]
    assert result.x.unique().tolist() == [-4.75]


@LAYOUT
def test_pab_skipped_step(config):
    host, x, cond = tiny_case(config)

    def expected(before, now):
        for block in host.blocks:
            kept = block.attention(before)
            before = block(before)
            if block.parallel:
                now = block.combine(now, attention=kept, mlp=block.mlp(now))
            else:
                now = block.combine(now, attention=kept)
                now = block.combine(now, mlp=block.mlp(now))
        return now

    result = assert_second_step(host, "pab:interval=2", x, cond, expected)
    n = len(host.blocks)
    assert result.report.hooked == tuple(f"block {i}: attention" for i in range(n))
    tokens = host.embed(x, torch.ones(2), torch.ones(2) if host.mean_flow else None, cond).shape[1]
    assert result.report.cache_bytes == n * 2 * tokens * 24 * 4  # blocks·B·N·C·float32


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ("interval=4", (0, 4, 8)),
        # starts: 1, .9, .8, .7, .6, .5, .4, .3, .2, .1; reuse only strictly between .25 and .85
        ("interval=3,window=[0.25,0.85]", (0, 1, 3, 6, 8, 9)),
    ],
)
def test_pab_steps(settings, computed):
    host = flat_host(2)
    report = sample(host, f"pab:{settings}", noise(), uniform(10)).report
    assert report.computed == computed
    assert report.skipped == tuple(i for i in range(10) if i not in computed)
    assert [block.calls for block in host.blocks] == [
        {"attention": len(computed), "mlp": 10},
        {"attention": len(computed), "mlp": 10},
    ]


def test_pab_mlp_broadcast():
    """From t = 0.8 the MLP of block 1 is kept for two steps and then let go."""
    host = flat_host(2)
    result = sample(
        host,
        "pab:interval=5,mlp_times=[0.85],mlp_blocks=[1],mlp_skip=2",
        noise(),
        uniform(10),
    )
    assert result.report.computed == (0, 5)
    assert host.blocks[0].calls == {"attention": 2, "mlp": 10}
    assert host.blocks[1].calls == {"attention": 2, "mlp": 8}
    assert result.report.hooked[-1] == "block 1: mlp"
    # 4 pixels and a text token, float32: two attentions all along, one MLP for a while
    assert result.report.cache_bytes == 3 * 5 * 4


def test_pab_mlp_broadcast_alone_makes_a_step_partial():
    report = sample(
        flat_host(1), "pab:interval=2,mlp_times=[1],mlp_blocks=[0],mlp_skip=4", noise(), uniform(6)
    ).report
    assert report.computed == (0,)
    assert report.skipped == (1, 2, 3, 4, 5)


def test_pab_overlapping_mlp_broadcasts():
    """A step that begins a broadcast computes its MLP even inside another one."""
    host = flat_host(1)
    spec = "pab:interval=5,mlp_times=[1,0.8],mlp_blocks=[0],mlp_skip=3"
    sample(host, spec, noise(), uniform(10))
    assert host.blocks[0].calls["mlp"] == 10 - 4  # reused at 1, 3, 4, 5; computed at 0 and 2


def test_pab_refusals():
    refused("pab:interval=1", "interval of 1 computes every step")
    refused("pab:interval=2,window=[0.5,0.5]", r"0 <= low < high <= 1, got \[0\.5, 0\.5\]")
    refused("pab:interval=2,window=[100,850]", r"paper's \[100, 850\] of 1000 is window=\[0\.1,0")
    refused("pab:interval=2,mlp_times=[0.5]", r"both mlp_times and mlp_blocks, got .*=\[0\.5\]")
    refused("pab:interval=2,mlp_blocks=[0]", r"mlp_times=\[\] and mlp_blocks=\[0\]")
    refused("pab:interval=2,mlp_times=[1],mlp_blocks=[0],mlp_skip=0", "at least 1, got 0")
    for times in ("[2.0]", "[0.5, -0.1]", "[.nan]"):
        refused(f"pab:interval=2,mlp_times={times},mlp_blocks=[0]", "mlp_times are times from 0 to")
    refused("pab:interval=2,window=[.nan,1]", r"0 <= low < high <= 1, got \[nan, 1\.0\]")
    refused("pab:interval=2,mlp_times=[1],mlp_blocks=[2]", "names block 2, .* blocks 0 to 1")
    refused("pab:interval=2,mlp_times=[0.1],mlp_blocks=[0]", "t = 0.1 reaches no step: .*0.333")
    refused("pab:interval=6", "no step can be skipped: of the 1 .* not a multiple of 6", steps=1)
    refused("pab:interval=2,window=[0.9,0.95]", "none starts between t = 0.9 and 0.95")


# Δ-DiT


@LAYOUT
@pytest.mark.parametrize("group", ["rear", "front"])
def test_delta_dit_skipped_step(config, group):
    host, x, cond = tiny_case(config)
    n = len(host.blocks)

    def expected(before, now):
        if group == "front":
            after = host.run(before, 0, 2)
            return host.run(now.with_tokens(now.tokens + after.tokens - before.tokens), 2)
        before = host.run(before, 0, n - 2)
        now = host.run(now, 0, n - 2)
        offset = host.run(before, n - 2).tokens - before.tokens
        return now.with_tokens(now.tokens + offset)

    boundary = 3 if group == "rear" else 0
    spec = f"delta-dit:interval=2,blocks=2,boundary={boundary}"
    result = assert_second_step(host, spec, x, cond, expected)
    named = f"blocks {n - 2} to {n - 1}: offset" if group == "rear" else "blocks 0 to 1: offset"
    assert result.report.hooked == (named,)
    tokens = host.embed(x, torch.ones(2), torch.ones(2) if host.mean_flow else None, cond).shape[1]
    assert result.report.cache_bytes == 2 * tokens * 24 * 4


def test_delta_dit_by_hand():
    """The offset is added to the tokens of now: 10 was added at t = 1, and the input moved."""
    # t = 1: both blocks: 0 + 10 + 10 = 20, x = 0 − ½·20 = −10
    # t = ½, rear block replaced: −10 + (½·4 + ½·1) + 10 = 2.5, x = −10 − ½·2.5 = −11.25
    result = sample(flat_host(2), "delta-dit:interval=2,blocks=1,boundary=2", noise(), [1, 0.5, 0])
    assert result.x.unique().tolist() == [-11.25]


def test_delta_dit_changes_group_at_the_boundary():
    """Of four blocks three are skipped: the last three before step 4, then the first three."""
    host = flat_host(4)
    result = sample(host, "delta-dit:interval=3,boundary=4", noise(), uniform(9))
    assert result.report.computed == (0, 3, 6)
    assert result.report.hooked == ("blocks 1 to 3: offset", "blocks 0 to 2: offset")
    # full at 0, 3, 6; the first block also at 1, 2 (rear skipped), the last at 4, 5, 7, 8 (front)
    assert [block.calls["mlp"] for block in host.blocks] == [5, 3, 3, 7]
    assert result.report.cache_bytes == 5 * 4  # one tensor of 4 pixels and a text token


def test_delta_dit_keeps_both_offsets_across_the_boundary():
    host = flat_host(4)
    result = sample(host, "delta-dit:interval=3,boundary=2,blocks=1", noise(), uniform(3))
    assert [block.calls["mlp"] for block in host.blocks] == [2, 3, 3, 2]
    assert result.report.cache_bytes == 2 * 5 * 4


def test_delta_dit_defaults():
    """Three quarters of the blocks, and the boundary in the middle of the run."""
    host = flat_host(8)
    sample(host, "delta-dit:interval=2", noise(), uniform(8))
    # full at 0, 2, 4, 6; rear six skipped at 1, 3, front six at 5, 7
    assert [block.calls["mlp"] for block in host.blocks] == [6, 6, 4, 4, 4, 4, 6, 6]


def test_delta_dit_refusals():
    refused("delta-dit:interval=1", "interval of 1 computes every step")
    refused("delta-dit:interval=2,blocks=3", "between 1 and 2, the number of blocks .* got 3")
    refused("delta-dit:interval=2,blocks=0", "between 1 and 2, the number of blocks .* got 0")
    refused("delta-dit:interval=2,boundary=7", "between 0 and 6, the number of steps, got 7")
    bare = TableHost()
    refused("delta-dit:interval=2", "the host has no blocks; .* such as 'easycache'", host=bare)
    refused("delta-dit:interval=2", "the first 1 steps are full and the run has 1", steps=1)


# DeepCache


@LAYOUT
def test_deepcache_skipped_step(config):
    host, x, cond = tiny_case(config)
    n = len(host.blocks)

    def expected(before, now):
        return host.run(now.with_tokens(host.run(before, 0, n - 1).tokens), n - 1)

    result = assert_second_step(host, "deepcache:interval=2", x, cond, expected)
    assert result.report.hooked == (f"tokens after block {n - 2}",)
    tokens = host.embed(x, torch.ones(2), torch.ones(2) if host.mean_flow else None, cond).shape[1]
    assert result.report.cache_bytes == 2 * tokens * 24 * 4


@pytest.mark.parametrize(
    ("settings", "steps", "computed"),
    [
        ("interval=3", 8, (0, 3, 6)),
        ("interval=4,first=3,final=2", 12, (0, 1, 2, 6, 10, 11)),
        # the released settings: start 11, end 45, interval 4
        (
            "interval=4,first=12,final=5",
            50,
            (*range(12), *range(15, 45, 4), *range(45, 50)),
        ),
    ],
)
def test_deepcache_steps(settings, steps, computed):
    host = flat_host(3)
    report = sample(host, f"deepcache:{settings},computed=2", noise(), uniform(steps)).report
    assert report.computed == computed
    assert [block.calls["mlp"] for block in host.blocks] == [len(computed), steps, steps]


def test_deepcache_refusals():
    refused("deepcache:interval=1", "interval of 1 computes every step")
    refused("deepcache:interval=2,first=0", "at least the first step is full, got first=0")
    refused("deepcache:interval=2,computed=0", "got computed=0; the policy .* is 'reuse'")
    refused("deepcache:interval=2,computed=2", "computed=2 of 2 blocks .* between 1 and 1")
    one, bare = flat_host(1), TableHost()
    refused("deepcache:interval=2", "has 1 block in all; .* such as 'reuse'", host=one)
    refused("deepcache:interval=2", "the host has no blocks; .* such as 'easycache'", host=bare)
    refused("deepcache:interval=2,final=-1", "at least 0, got -1")
    refused("deepcache:interval=2,first=4,final=2", "first 4 and the last 2 of 6 steps are full")


# First-block cache


@LAYOUT
def test_first_block_skipped_step(config):
    host, x, cond = tiny_case(config)

    def expected(before, now):
        first = host.run(before, 0, 1)
        rest = host.run(first, 1).tokens - first.tokens
        now = host.run(now, 0, 1)
        return now.with_tokens(now.tokens + rest)

    result = assert_second_step(host, "first-block:threshold=1e9", x, cond, expected)
    n = len(host.blocks)
    assert result.report.hooked == (
        "block 0: residual of the video tokens",
        f"blocks 1 to {n - 1}: residual",
    )
    state = host.embed(x, torch.ones(2), torch.ones(2) if host.mean_flow else None, cond)
    # B·C·float32, for the video tokens of the test and all tokens of the others
    assert result.report.cache_bytes == 2 * 24 * 4 * (state.n_video + state.shape[1])


def residual_host(*residuals):
    """The first block adds the numbers given, one a step (its gate is undone); the second 1."""
    times = uniform(len(residuals))[:-1].tolist()
    table = {round(t, 6): value / t for t, value in zip(times, residuals, strict=True)}
    return TableHost(
        TableBlock(table.__getitem__, lambda t: 0.0), TableBlock(lambda t: 1.0, lambda t: 0.0)
    )


def test_first_block_steps():
    """Compared with the last computed step, so that small changes add up."""
    # changes against the kept one: .1 of 10 skip; 1 → .1 skip; 2.5 → .25 compute, keep 12.5;
    # −.5 → .04 skip; 6.5 → .52 compute, keep 6
    host = residual_host(10, 10.1, 11, 12.5, 12, 6)
    report = sample(host, "first-block:threshold=0.2", noise(), uniform(6)).report
    assert report.computed == (0, 3, 5)
    assert report.skipped == (1, 2, 4)
    assert [block.calls["attention"] for block in host.blocks] == [6, 3]


def test_first_block_decides_for_the_batch():
    """The mean change decides: one sample alone would be computed, the other skipped."""
    host, x, cond = tiny_case(LAYOUTS["1.0-plain"])
    times = uniform(2)
    with torch.no_grad():
        before, _, now = first_step(host, x, cond, torch.cat([times, times[-1:]]))
        kept = host.run(before, 0, 1).video - before.video
        change = (host.run(now, 0, 1).video - now.video - kept).abs()
        mean = float(change.mean() / kept.abs().mean())
    above = sample(host, f"first-block:threshold={mean * 1.001}", x, times, cond)
    assert above.report.skipped == (1,)
    with pytest.raises(UserError, match="skipped 0 of 2 steps: it changed nothing"):
        sample(host, f"first-block:threshold={mean * 0.999}", x, times, cond)


def test_first_block_refusals():
    refused("first-block:threshold=0", "no change is below a threshold of 0")
    refused("first-block:threshold=.nan", "no change is below a threshold of nan")
    refused("first-block:threshold=0.1", "the host has 1 in all", host=flat_host(1))
    refused("first-block:threshold=1e-6", "first-block.*skipped 0 of 6 steps")
