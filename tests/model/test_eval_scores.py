# SPDX-License-Identifier: Apache-2.0
"""Scores against closed forms and hand-made cases."""

import math

import pytest
import torch

from disca.errors import UserError
from disca.eval import (
    ClipClassifier,
    curvature,
    frechet_distance,
    jitter,
    psnr,
    relative_error,
    relative_errors,
    semantic_score,
    ssim,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, width: int, seed: int) -> torch.Tensor:
    """Rows whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = noise(n, width, seed=seed)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T).reshape(width, width))
    return x @ vectors @ torch.diag(values.rsqrt())


class Reader(ClipClassifier):
    """Reads labels that a test wrote into the first pixels."""

    def __init__(self) -> None:
        super().__init__(1, (10, 4, 2))

    def predict(self, clips: torch.Tensor, batch: int = 256) -> torch.Tensor:
        return clips[:, 0, 0, 0, :3].long()


def test_semantic_score_counts():
    labels = torch.tensor([[1, 2, 0], [3, 1, 1], [9, 0, 1], [0, 0, 0]])
    clips = torch.zeros(4, 1, 2, 4, 4)
    clips[:, 0, 0, 0, :3] = labels
    clips[1, 0, 0, 0, 0] = 4  # one wrong digit
    clips[2, 0, 0, 0, 1:3] = torch.tensor([1.0, 0.0])  # direction and speed wrong
    score = semantic_score(Reader(), clips, labels)
    assert score.as_dict() == pytest.approx(
        {
            "digit": 0.75,
            "direction": 0.75,
            "speed": 0.75,
            "mean": 0.75,
            "joint": 0.5,
            "count": 4,
        }
    )


@pytest.mark.parametrize(("n", "width"), [(50, 1), (200, 5), (300, 64)])
def test_frechet_closed_form(n, width):
    """Diagonal Gaussians: sum of (mean difference)² + (difference of standard deviations)²."""
    mean_a, mean_b = noise(width, seed=1), noise(width, seed=2)
    std_a, std_b = noise(width, seed=3).abs() + 0.1, noise(width, seed=4).abs() + 0.1
    a = whitened(n, width, 5) * std_a + mean_a
    b = whitened(n + 7, width, 6) * std_b + mean_b
    expected = ((mean_a - mean_b).square() + (std_a - std_b).square()).sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    """Against the matrix square root of SciPy."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = noise(90, 6, seed=1) @ noise(6, 6, seed=2), noise(80, 6, seed=3) @ noise(6, 6, seed=4)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(linalg.sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("n", [2, 10, 500])
def test_frechet_of_equal_sets_is_zero(n):
    """Also with fewer rows than features, where the covariance has no full rank."""
    x = noise(n, 32) * 3 + 1
    assert frechet_distance(x, x.flip(0)) < 1e-5
    assert frechet_distance(x.float(), x.float() + 1.0) == pytest.approx(32.0, abs=1e-3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(5, 4), r"features_a must be .* got shape \[0, 4\]"),
        (torch.zeros(5, 4), torch.zeros(1, 4), r"features_b must be .* got shape \[1, 4\]"),
        (torch.zeros(5, 0), torch.zeros(5, 0), "features_a must be"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "one width, got 4 and 3"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.nan), "features_b holds values"),
    ],
)
def test_frechet_rejects(a, b, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)


def test_relative_error_is_a_mean_of_ratios():
    reference = torch.stack([torch.full((1, 2, 2, 2), 1.0), torch.full((1, 2, 2, 2), 10.0)])
    clips = reference.clone()
    clips[0] += 0.5  # (0.5 / 1)² = 0.25
    clips[1] += 1.0  # (1 / 10)² = 0.01
    assert relative_error(clips, reference) == pytest.approx(0.13)
    assert relative_errors(clips, reference).mean().item() == pytest.approx(0.13)
    assert relative_errors(clips, reference).shape == (len(clips),)
    assert relative_error(reference, reference) == 0.0
    strided = torch.stack([clips, clips], -1)[..., 0]
    assert relative_error(strided, reference) == pytest.approx(0.13)


def test_jitter_sees_flicker_only():
    reference = torch.zeros(1, 1, 4, 2, 2)
    reference[:, :, :] = torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert jitter(reference + 5.0, reference) == 0.0
    flicker = reference.clone()
    flicker[:, :, 1::2] += 1.0
    assert jitter(flicker, reference) == pytest.approx(1.0)


def test_psnr_of_a_known_error():
    """Offset 0.2 on a range of 2: 10 log10(4 / 0.04) = 20 dB; a mean over clips of decibels."""
    reference = torch.zeros(2, 1, 3, 4, 4)
    clips = reference + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    assert psnr(clips, reference) == pytest.approx(30.0, abs=1e-4)
    assert psnr(reference, reference) == math.inf


def test_ssim():
    clips = noise(2, 3, 4, 16, 12).tanh().float()
    assert ssim(clips, clips) == pytest.approx(1.0, abs=1e-6)
    slightly, badly = (clips + s * noise(2, 3, 4, 16, 12, seed=9).float() for s in (0.05, 0.5))
    assert ssim(badly, clips) < ssim(slightly, clips) < 1.0


@pytest.mark.parametrize("score", [relative_error, jitter, psnr, ssim])
def test_pairs_reject(score):
    ones = torch.ones(2, 1, 3, 16, 16)
    with pytest.raises(UserError, match=r"one shape, got \[2, .*\[1, "):
        score(ones, ones[:1])
    with pytest.raises(UserError, match="at least one clip"):
        score(ones[:0], ones[:0])
    with pytest.raises(UserError, match="reference holds values that are not finite"):
        score(ones, ones * torch.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: relative_error(x, x * 0), "zero everywhere"),
        (lambda x: jitter(x, x), "stands still"),
        (lambda x: jitter(x[:, :, :1], x[:, :, :1]), "F >= 2"),
        (lambda x: ssim(x[..., :10], x[..., :10]), "at least 11 pixels"),
        (lambda x: semantic_score(Reader(), x, torch.zeros(3, 3)), r"labels must be \[2, 3\]"),
        (lambda x: semantic_score(Reader(), x[:0], torch.zeros(0, 3)), "at least one clip"),
        (lambda x: semantic_score(Reader(), x * torch.nan, torch.zeros(2, 3)), "not finite"),
    ],
)
def test_scores_reject(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.ones(2, 1, 3, 16, 16))


def test_straight_path():
    start, direction = noise(3, 2, 4), noise(3, 2, 4, seed=1)
    times = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    path = torch.stack([start + t * direction for t in times])
    shape = curvature(path, times)
    assert list(shape.as_dict().values()) == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    uneven = curvature(path)
    assert uneven.turning == pytest.approx(0.0, abs=1e-12)
    assert uneven.straightness > 0.1


def test_right_angle():
    """Two legs of length 1 at a right angle: cos 0, detour 2 / √2, ‖chord - v‖² = 2 of 2."""
    path = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    shape = curvature(path)
    assert shape.turning == pytest.approx(1.0)
    assert shape.detour == pytest.approx(math.sqrt(2) - 1)
    assert shape.straightness == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [40, 400])
def test_half_circle(steps):
    """Successive chords of a half circle of S steps turn by pi / S; the detour is pi/2 - 1."""
    angle = torch.linspace(0, math.pi, steps + 1, dtype=torch.float64)
    path = torch.stack([angle.cos(), angle.sin()], 1)[:, None].expand(-1, 4, -1)
    shape = curvature(path)
    assert shape.turning == pytest.approx(1 - math.cos(math.pi / steps), rel=1e-6)
    assert shape.detour == pytest.approx(math.pi / 2 - 1, rel=2e-3)


@pytest.mark.parametrize(
    ("trajectory", "times", "message"),
    [
        (torch.zeros(2, 1, 3), None, "S >= 2"),
        (torch.zeros(3, 0, 3), None, "B >= 1"),
        (torch.zeros(3, 1, 3), None, "length zero"),
        (torch.full((3, 1, 3), torch.nan), None, "not finite"),
        (torch.eye(3)[:, None], torch.tensor([1.0, 0.5]), r"times must be \[3\]"),
        (torch.eye(3)[:, None], torch.tensor([1.0, 0.5, 0.5]), "strictly monotonic"),
    ],
)
def test_curvature_rejects(trajectory, times, message):
    with pytest.raises(UserError, match=message):
        curvature(trajectory, times)
