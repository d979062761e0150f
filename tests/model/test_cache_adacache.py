# SPDX-License-Identifier: Apache-2.0
"""AdaCache: the codebook's choice, motion regularisation, what is kept and what is refused."""

from __future__ import annotations

import pytest
import torch

from disca.cache.adacache import CODEBOOKS
from disca.errors import UserError
from tests.model.cache_hosts import LAYOUTS, TableBlock, TableHost, sample, tiny_case, uniform

LAYOUT = pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
BOOK = "codebook={0.1: 4, 0.3: 2, 1.0: 1}"


def by_step(values):
    """A table of one number a step of a uniform schedule."""
    times = uniform(len(values))[:-1].tolist()
    return {round(t, 6): v for t, v in zip(times, values, strict=True)}.__getitem__


def computed(host, spec, steps, frames=1):
    report = sample(
        host, f"adacache:{spec}", torch.zeros(2, 1, frames, 1, 1), uniform(steps)
    ).report
    assert sorted(report.computed + report.skipped) == list(range(steps))
    return report.computed


@LAYOUT
def test_skipped_step(config):
    """A skipped step adds the outputs of the last computed one through the gates of now."""
    host, x, cond = tiny_case(config)
    times = uniform(6)
    result = sample(host, "adacache:codebook={9e9: 3}", x, times, cond)
    assert result.report.computed == (0, 1, 4, 5)

    def embed(index, x):
        t, r = (times[i].expand(len(x)) for i in (index, index + 1))
        return host.embed(x, t, r if host.mean_flow else None, cond)

    with torch.no_grad():
        computed, skipped = embed(1, result.trajectory[0]), embed(2, result.trajectory[1])
        for block in host.blocks:
            attention = block.attention(computed)
            if block.parallel:
                mlp = block.mlp(computed)
                computed = block.combine(computed, attention=attention, mlp=mlp)
                skipped = block.combine(skipped, attention=attention, mlp=mlp)
            else:
                computed = block.combine(computed, attention=attention)
                mlp = block.mlp(computed)
                computed = block.combine(computed, mlp=mlp)
                skipped = block.combine(block.combine(skipped, attention=attention), mlp=mlp)
        expected = result.trajectory[1] - (times[2] - times[3]) * host.head(skipped)
        whole = result.trajectory[1] - (times[2] - times[3]) * host.head(
            host.run(embed(2, result.trajectory[1]))
        )
    torch.testing.assert_close(result.trajectory[2], expected, rtol=1e-5, atol=1e-5)
    assert (expected - whole).abs().max() > 1e-3
    n, tokens = len(host.blocks), computed.shape[1]
    assert len(result.report.hooked) == 2 * n
    assert result.report.hooked[1] == "block 0: mlp"
    assert result.report.cache_bytes == 2 * n * 2 * tokens * 24 * 4  # parts·blocks·B·N·C·float32


def test_codebook_by_hand():
    # step 1: |10.5 − 10| / 10 / 1 = .05 -> 4, so step 5
    # step 5: |18.9 − 10.5| / 10.5 / 4 = .2 -> 2, so step 7
    # step 7: |37.8 − 18.9| / 18.9 / 2 = .5 -> 1, so step 8
    # step 8: |128.52 − 37.8| / 37.8 / 1 = 2.4, beyond every key -> 1, so step 9
    # step 9: no change -> 4, but the last two steps of 13 come first
    values = [10, 10.5, 0, 0, 0, 18.9, 0, 37.8, 128.52, 128.52, 0, 128.52, 128.52]
    host = TableHost(TableBlock(by_step(values), lambda t: 1.0))
    assert computed(host, BOOK, 13) == (0, 1, 5, 7, 8, 9, 11, 12)
    assert host.blocks[0].calls == {"attention": 8, "mlp": 8}


def test_text_tokens_have_no_vote():
    class TextMoves(TableBlock):
        def attention(self, state):
            output = super().attention(state)
            output[:, -1] = 1000 * state.vec[0]
            return output

    host = TableHost(TextMoves(lambda t: 5.0, lambda t: 1.0))
    assert computed(host, BOOK, 8) == (0, 1, 5, 6, 7)


@pytest.mark.parametrize(
    ("vote", "second"),
    [
        ("", 2),  # of three blocks the middle one: .5 -> 1
        (",vote=[0]", 5),  # .02 -> 4
        (",vote=[0, 2]", 3),  # (.02 + .38) / 2 = .2 -> 2
        (",vote=[1],part=mlp", 5),  # the MLP does not change
    ],
)
def test_vote(vote, second):
    changes = (0.02, 0.5, 0.38)
    host = TableHost(
        *(TableBlock(by_step([1.0] + [1 + change] * 8), lambda t: 1.0) for change in changes)
    )
    assert computed(host, BOOK + vote, 9)[2] == second


class Moving(TableBlock):
    """Attention returns one number a frame, times a table of the steps."""

    def __init__(self, frames, values):
        super().__init__(by_step(values), lambda t: 1.0)
        self.frames = torch.tensor(frames)

    def attention(self, state):
        output = super().attention(state)
        output[:, :-1] *= self.frames.view(1, -1, 1)
        return output


# Frames 1, 2, 1: q = (|2 − 1| + |1 − 2|) / (2 + 1 + 1 + 2) = 1/3 at stride 1 and 0 at stride 2.
# From step 0 to step 1 the output grows by a fifth, so c = .2, which alone means 2 steps.
@pytest.mark.parametrize(
    ("motion", "second"),
    [
        ("motion=false", 3),
        ("motion_scale=0.3333333,motion_power=2,gradient=0", 3),  # m = 1
        ("motion_scale=0.1666667,motion_power=2,gradient=0", 2),  # m = 4, c = .8 -> 1
        ("motion_scale=0.6666667,motion_power=2,gradient=0", 5),  # m = 1/4, c = .05 -> 4
        ("motion_scale=0.6666667,motion_power=2,gradient=1", 3),  # 1/4 + |1/4 − 1| = 1
        ("motion_scale=0.1666667,motion_power=2,gradient=0,motion_strides=[1, 2]", 3),  # q = 1/6
        ("motion_scale=0.1666667,motion_power=2,gradient=0,motion_window=[0.5, 1]", 3),  # m = 1
        ("motion_scale=0.1666667,motion_power=2,gradient=0,motion_window=[0.25, 1]", 2),  # 2 of 8
    ],
)
def test_motion_by_hand(motion, second):
    spec = motion if motion.startswith("motion=") else f"motion=true,{motion}"
    spec = spec if "window" in spec else f"{spec},motion_window=[0, 1]"
    host = TableHost(Moving([1.0, 2.0, 1.0], [1.0] + [1.2] * 7))
    assert computed(host, f"{BOOK},{spec}", 8, frames=3)[2] == second


def test_motion_gradient_is_against_the_last_computed_step():
    # step 1: c = .01, m = 4 (1 before it): .01 · (4 + 3) = .07 -> 4, so step 5
    # step 5: c = .28 / 4 = .07, m = 4 as at step 1: .28 -> 2, so step 7; against 1 it would be
    # .07 · (4 + ¾) = .33 -> 1
    values = [1.0] + [1.01] * 4 + [1.01 * 1.28] * 5
    host = TableHost(Moving([1.0, 2.0, 1.0], values))
    spec = (
        f"{BOOK},motion=true,motion_scale=0.1666667,motion_power=2,gradient=1,motion_window=[0, 1]"
    )
    assert computed(host, spec, 10, frames=3) == (0, 1, 5, 7, 8, 9)
    assert computed(host, spec, 10, frames=3) == (0, 1, 5, 7, 8, 9)  # nothing is left of a run


def test_named_codebooks():
    """The published tables: never longer reuse for a larger change."""
    for book in CODEBOOKS.values():
        assert list(book) == sorted(book)
        assert list(book.values()) == sorted(book.values(), reverse=True)
    host = TableHost(TableBlock(lambda t: 1.0, lambda t: 1.0))
    assert computed(host, "codebook=fast100", 20) == (0, 1, 13, 18, 19)  # no change: 12 steps
    assert computed(host, "codebook=fast30", 20) == (0, 1, 7, 13, 18, 19)
    assert computed(host, "codebook=slow30", 10) == (0, 1, 4, 7, 8, 9)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("codebook=fast50", "no codebook 'fast50'; there are: fast100, fast30, slow30"),
        ("codebook={}", "in increasing order, to whole numbers of steps from 1 on, .*; got {}"),
        ("codebook={0.3: 2, 0.1: 4}", r"in increasing order, .* got \{0\.3: 2, 0\.1: 4\}"),
        ("codebook={0.3: 0}", r"whole numbers of steps from 1 on, .* got \{0\.3: 0\}"),
        ("codebook={0.1: 0.5}", r"one of the names fast100, .* got \{0\.1: 0\.5\}"),
        ("codebook=5", "maps changes above 0, .*such as {0.1: 4, 0.3: 2, 1.0: 1}; got 5"),
        ("codebook={0: 4, 1.0: 2}", r"maps changes above 0, .* got \{0: 4, 1\.0: 2\}"),
        ("codebook={.nan: 4}", r"maps changes above 0, .* got \{nan: 4\}"),
        ("codebook={0.1: 4, .nan: 2}", r"in increasing order, .* got \{0\.1: 4, nan: 2\}"),
        ("codebook={0.3: 1, 1.0: 1}", "computes every step and skips none"),
        ("vote=[1]", "vote names block 1, but the host has blocks 0 to 0"),
        ("motion_scale=0", "motion_scale and motion_power must be above 0, .* got 0, 8 and 10"),
        ("gradient=-1", "gradient at least 0 .* got 0.385, 8 and -1"),
        ("motion_scale=.nan", "all three finite, got nan, 8 and 10"),
        ("motion_scale=.inf", "all three finite, got inf, 8 and 10"),
        ("motion_power=.nan", "all three finite, got 0.385, nan and 10"),
        ("gradient=.inf", "all three finite, got 0.385, 8 and inf"),
        ("motion_window=[.nan, 1]", r"0 <= first <= last <= 1, got \[nan, 1\.0\]"),
        ("motion_strides=[]", r"distances of 1 frame or more, got \[\]"),
        ("motion_strides=[0]", r"distances of 1 frame or more, got \[0\]"),
        ("motion_window=[0.9, 0.1]", r"0 <= first <= last <= 1, got \[0\.9, 0\.1\]"),
        ("motion=true,motion_strides=[1, 2]", "over 2 frames .* of more, this one has 2"),
        ("codebook={0.1: 4, 0.3: 1}", "adacache.*skipped 0 of 6 steps: it changed nothing"),
    ],
)
def test_refusals(spec, message):
    host = TableHost(TableBlock(lambda t: 2.0 ** (12 * t), lambda t: 1.0))
    with pytest.raises(UserError, match=message):
        computed(host, spec, 6, frames=2)


def test_refuses_a_run_without_a_middle():
    host = TableHost(TableBlock(lambda t: 1.0, lambda t: 1.0))
    with pytest.raises(UserError, match="of 4 steps it would skip none; take 5 or more"):
        computed(host, "", 4)
    assert computed(host, "", 5) == (0, 1, 3, 4)
