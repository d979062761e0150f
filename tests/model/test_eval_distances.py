# SPDX-License-Identifier: Apache-2.0
"""Sliced Wasserstein distances against sums worked out by hand."""

import math

import pytest
import torch

from disca.data import MovingDigits
from disca.data.source import ClipBatch
from disca.errors import UserError
from disca.eval import real_distances, sliced_wasserstein


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def line(*frames: float) -> torch.Tensor:
    """One clip of single pixels, a value for each frame."""
    return torch.tensor(frames).view(1, 1, len(frames), 1, 1)


def test_a_shift_by_hand():
    """Patches of one clip: the projections differ by w·1, whose mean size over a sphere is known.

    The patch is the whole clip [0, 2] against [1, 3]: W = mean |w_1 + w_2| / std, std of {1, 3} is
    1, and w = (cos a, sin a), so mean |cos a + sin a| = 2·sqrt(2)/pi. The differences are equal.
    """
    score = sliced_wasserstein(
        line(0, 2), line(1, 3), patch=1, frames=2, patches=3, projections=40000
    )
    assert score.values == pytest.approx(2 * math.sqrt(2) / math.pi, rel=0.02)
    assert score.differences == 0
    assert score.mean == score.values / 2
    assert score.as_dict() == {"values": score.values, "differences": 0, "mean": score.mean}


def test_differences_by_hand():
    """One difference a patch, so w = ±1: 3 against 2 relative to 2."""
    score = sliced_wasserstein(line(0, 3), line(0, 2), patch=1, frames=2, patches=5)
    assert score.differences == pytest.approx(0.5)


def test_projections_are_sorted():
    """Sets of frame-to-frame steps {1, 3} and {3, 1} are one set, whichever clip has which."""
    a = torch.cat([line(0, 1), line(0, 3)])
    options = {"patch": 1, "frames": 2, "patches": 4000, "projections": 8}
    assert sliced_wasserstein(a, a.flip(0), **options).mean < 0.05
    # Steps {2, 2} instead: each of the sorted steps is off by 1, relative to sqrt((1 + 9) / 2).
    other = sliced_wasserstein(torch.cat([line(0, 2)] * 2), a, **options)
    assert other.differences == pytest.approx(1 / math.sqrt(5), rel=0.05)


def test_equal_sets_and_seeds():
    a, b = noise(6, 3, 5, 16, 16, seed=1), noise(9, 3, 5, 16, 16, seed=2)
    options = {"patches": 200, "projections": 16}
    assert sliced_wasserstein(a, a.clone(), **options).mean == 0
    assert sliced_wasserstein(a, b, **options) == sliced_wasserstein(a, b, **options)
    assert sliced_wasserstein(a, b, **options) != sliced_wasserstein(a, b, seed=1, **options)
    before = torch.random.get_rng_state()
    sliced_wasserstein(a, b, **options)
    assert torch.equal(before, torch.random.get_rng_state())


def test_flicker_shows_in_the_differences():
    still = noise(16, 1, 1, 16, 16).expand(-1, -1, 8, -1, -1) + 0.1 * noise(
        16, 1, 8, 16, 16, seed=1
    )
    flicker = still + 0.3 * noise(16, 1, 8, 1, 1, seed=2)
    score = sliced_wasserstein(flicker, still, patches=1000, projections=32)
    assert score.differences > 0.5
    assert score.values < 0.2


def test_scales():
    """Means over blocks of 2 x 2 hide a checkerboard; by default 1 and 2 are used here."""
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2) * 2.0 - 1
    smooth = noise(64, 1, 2, 4, 4).repeat_interleave(2, 3).repeat_interleave(2, 4)
    rough = smooth + board
    options = {"patch": 4, "frames": 2, "patches": 500, "projections": 16}
    one, two, both = (
        sliced_wasserstein(rough, smooth, scales=scales, **options).values
        for scales in ([1], [2], None)
    )
    assert one > 0.1
    assert two < 1e-6
    assert both == pytest.approx(one / 2, rel=1e-6)
    cut = torch.cat([smooth, 100 + noise(64, 1, 2, 8, 1)], 4)  # a ninth column, left out at scale 2
    assert sliced_wasserstein(cut, cut * 1, scales=[2], **options).mean == 0
    assert (
        sliced_wasserstein(cut, torch.cat([smooth, smooth[..., :1]], 4), scales=[2], **options).mean
        == 0
    )


@pytest.mark.parametrize(
    ("clips", "options", "message"),
    [
        (noise(2, 4, 8, 8), {}, r"clips must be \[B, C, F, H, W\].*got shape \[2, 4, 8, 8\]"),
        (noise(0, 1, 4, 8, 8), {}, r"at least one clip, got shape \[0, 1, 4, 8, 8\]"),
        (noise(2, 3, 4, 8, 8), {}, r"one shape.*\[3, 4, 8, 8\] and \[1, 4, 8, 8\]"),
        (torch.full((2, 1, 4, 8, 8), torch.inf), {}, "clips holds values that are not finite"),
        (noise(2, 1, 4, 8, 8), {"patch": 9}, r"4 frames of 9x9.*does not fit.*4 frames of 8x8"),
        (noise(2, 1, 4, 8, 8), {"frames": 5}, "5 frames of 8x8.*does not fit"),
        (noise(2, 1, 4, 8, 8), {"frames": 1}, "frames must be at least 2, got 1"),
        (noise(2, 1, 4, 8, 8), {"patches": 0}, "patches must be at least 1"),
        (noise(2, 1, 4, 8, 8), {"projections": 1.5}, "projections must be an integer, got 1.5"),
        (noise(2, 1, 4, 8, 8), {"scales": []}, "scales must name at least one"),
        (noise(2, 1, 4, 8, 8), {"scales": [1, 2]}, r"scale 2 leaves 4 of 8.*that fits is 1"),
        (noise(2, 1, 4, 8, 8), {"scales": [0]}, "scale must be at least 1, got 0"),
    ],
)
def test_rejects(clips, options, message):
    with pytest.raises(UserError, match=message):
        sliced_wasserstein(clips, noise(3, 1, 4, 8, 8), **options)


def test_rejects_references_without_a_scale():
    clips = noise(2, 1, 4, 8, 8)
    with pytest.raises(UserError, match="the reference is flat"):
        sliced_wasserstein(clips, torch.ones(2, 1, 4, 8, 8))
    with pytest.raises(UserError, match="the reference stands still"):
        sliced_wasserstein(clips, clips[:, :, :1].expand(-1, -1, 4, -1, -1))


class TwoFiles:
    """Train clips are noise, held-out clips the same kind of noise at half the contrast."""

    def sample(self, n: int, generator: torch.Generator, *, split: str = "train") -> ClipBatch:
        clips = torch.randn(n, 1, 4, 8, 8, generator=generator)
        return ClipBatch(clips if split == "train" else clips / 2, MovingDigits().null(n))


def test_real_distances():
    """Every projection of train noise is twice as wide: mean |2 z - z| / 1 = sqrt(2 / pi)."""
    real = real_distances(TwoFiles(), 2000)
    assert real.same.mean < 0.06
    assert real.held_out.values == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    assert real.held_out.differences == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    with pytest.raises(UserError, match="number of real clips must be at least 1"):
        real_distances(TwoFiles(), 0)
