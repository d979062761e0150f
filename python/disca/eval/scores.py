# SPDX-License-Identifier: Apache-2.0
"""Scores of clips, each named as what it is; none needs downloaded weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from disca.data.source import check_integer
from disca.errors import UserError
from disca.eval.classifier import ATTRIBUTES, ClipClassifier, LabelledSource

__all__ = [
    "Curvature",
    "RealScores",
    "SemanticScore",
    "curvature",
    "frechet_distance",
    "jitter",
    "psnr",
    "real_scores",
    "relative_error",
    "relative_errors",
    "semantic_score",
    "ssim",
]


@dataclass(frozen=True)
class SemanticScore:
    """Share of clips in which the classifier reads what the prompt asked for.

    Attributes:
        digit: accuracy of the digit (with two digits, both right).
        direction: accuracy of the direction.
        speed: accuracy of the speed.
        mean: mean of the three.
        joint: share of clips with all three right.
        count: number of clips.
    """

    digit: float
    direction: float
    speed: float
    mean: float
    joint: float
    count: int

    def as_dict(self) -> dict[str, float]:
        """The fields as a plain mapping."""
        return asdict(self)


@dataclass(frozen=True)
class RealScores:
    """What real clips score: the level that generated clips are to be read against.

    Attributes:
        semantic: semantic score of held-out (test split) real clips, the classifier's own ceiling.
        frechet: Fréchet distance between real train and real held-out clips, the floor of the
            quality score at this number of clips.
        features: features ``[n, D]`` of the held-out clips, the reference of `frechet_distance`.
    """

    semantic: SemanticScore
    frechet: float
    features: Tensor


@dataclass(frozen=True)
class Curvature:
    """How far sampling paths are from straight lines; all three are 0 for straight, even paths.

    Attributes:
        turning: mean of 1 - cos(v_i, v_{i+1}) over successive velocities and clips.
        detour: path length over chord, minus 1.
        straightness: integral of ‖(x_1 - x_0) - v‖² dt over ‖x_1 - x_0‖², the straightness of
            Rectified Flow (Liu et al. 2022, arXiv 2209.03003) relative to the chord.
    """

    turning: float
    detour: float
    straightness: float

    def as_dict(self) -> dict[str, float]:
        """The fields as a plain mapping."""
        return asdict(self)


def semantic_score(classifier: ClipClassifier, clips: Tensor, labels: Tensor) -> SemanticScore:
    """Accuracy of the classifier's reading of `clips` against what was asked for.

    Args:
        classifier: trained on real clips of the same kind.
        clips: ``[B, C, F, H, W]`` in [-1, 1].
        labels: int64 ``[B, 3]``: digit, direction, speed asked for.

    Raises:
        UserError: no clips, values not finite, or labels of another shape.
    """
    _check_clips("clips", clips)
    if labels.shape != (len(clips), len(ATTRIBUTES)):
        raise UserError(
            f"labels must be [{len(clips)}, {len(ATTRIBUTES)}], got shape {list(labels.shape)}"
        )
    right = classifier.predict(clips) == labels.to(clips.device)  # [B, 3]
    digit, direction, speed = right.double().mean(0).tolist()
    return SemanticScore(
        digit=digit,
        direction=direction,
        speed=speed,
        mean=(digit + direction + speed) / 3,
        joint=right.all(1).double().mean().item(),
        count=len(clips),
    )


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    ‖m_a - m_b‖² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½), with unbiased covariances, in float64. On
    features of `ClipClassifier` this is a distance *in that classifier's features*, neither FID nor
    FVD, and comparable only for one classifier and one number of clips: with few clips the estimate
    is biased upwards.

    Args:
        features_a: ``[n, D]`` with n >= 2.
        features_b: ``[m, D]`` with m >= 2.

    Returns:
        The (squared) distance; 0 for equal sets, never negative.

    Raises:
        UserError: shapes do not fit, fewer than two rows, or values not finite.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.dim() != 2 or len(features) < 2 or features.shape[1] == 0:
            raise UserError(
                f"{name} must be [n, D] with n >= 2 and D >= 1, got shape {list(features.shape)}"
            )
        if not torch.isfinite(features).all():
            raise UserError(f"{name} holds values that are not finite")
    if features_a.shape[1] != features_b.shape[1]:
        raise UserError(
            f"features must have one width, got {features_a.shape[1]} and {features_b.shape[1]}"
        )
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(features_a), _gaussian(features_b)
    # The product of two covariances is not symmetric and its eigenvalues are ill-conditioned when
    # ranks are short; the similar matrix R S_b R with R = S_a^½ is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def real_scores(
    classifier: ClipClassifier, source: LabelledSource, n: int, *, seed: int = 0
) -> RealScores:
    """Score `n` real held-out clips, and measure how far they are from `n` real train clips.

    Args:
        classifier: trained on the train split of `source`.
        source: labelled clips.
        n: number of clips of either split, at least 2; score generated clips in the same number.
        seed: seed of both draws.

    Raises:
        UserError: n is too small, or the source has no labels.
    """
    check_integer("number of real clips", n, 2)
    generator = torch.Generator().manual_seed(seed)
    train = source.sample(n, generator, split="train")
    test = source.sample(n, generator, split="test")
    if test.labels is None:
        raise UserError("real scores need a source with labels")
    features = classifier.embed(test.clips)
    return RealScores(
        semantic=semantic_score(classifier, test.clips, test.labels),
        frechet=frechet_distance(classifier.embed(train.clips), features),
        features=features,
    )


def relative_error(clips: Tensor, reference: Tensor) -> float:
    """Mean over clips of ‖a - b‖² / ‖b‖², a of `clips` and b of `reference`, both ``[B, ...]``.

    Raises:
        UserError: shapes differ, nothing to compare, values not finite, or a reference of zeros.
    """
    return relative_errors(clips, reference).mean().item()


def relative_errors(clips: Tensor, reference: Tensor) -> Tensor:
    """‖a - b‖² / ‖b‖² of every clip, float64 ``[B]``; see `relative_error`.

    The mean can hang on a few clips that went elsewhere altogether; the median tells of the rest.

    Raises:
        UserError: as `relative_error`.
    """
    a, b = _pair(clips, reference)
    return _relative(a, b, "a reference clip is zero everywhere")


def jitter(clips: Tensor, reference: Tensor) -> float:
    """Error of the temporal differences: mean of ‖δa - δb‖² / ‖δb‖², δ from frame to frame.

    Flicker that hardly moves `relative_error` shows here.

    Args:
        clips: ``[B, C, F, H, W]`` with F >= 2.
        reference: same shape.

    Raises:
        UserError: as `relative_error`; a single frame, or a reference that stands still.
    """
    a, b = _pair(clips, reference)
    if a.dim() != 5 or a.shape[2] < 2:
        raise UserError(
            f"jitter needs clips [B, C, F, H, W] with F >= 2, got shape {list(a.shape)}"
        )
    return _relative(a.diff(dim=2), b.diff(dim=2), "a reference clip stands still").mean().item()


def psnr(clips: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1], mean over clips; inf if all are equal.

    Values outside [-1, 1] are clamped.

    Raises:
        UserError: shapes differ, nothing to compare, or values not finite.
    """
    a, b = _pair(clips, reference)
    value = peak_signal_noise_ratio(
        a, b, data_range=(-1.0, 1.0), dim=tuple(range(1, a.dim())), reduction="elementwise_mean"
    )
    return float(value)


def ssim(clips: Tensor, reference: Tensor) -> float:
    """Structural similarity of frames (Gaussian window of 11 pixels), mean over all frames.

    Args:
        clips: ``[B, C, F, H, W]`` in [-1, 1] (clamped), sides of at least 11 pixels.
        reference: same shape.

    Raises:
        UserError: shapes differ or do not fit, nothing to compare, or values not finite.
    """
    a, b = _pair(clips, reference)
    if a.dim() != 5 or min(a.shape[-2:]) < 11:
        raise UserError(
            "ssim needs clips [B, C, F, H, W] with sides of at least 11 pixels, "
            f"got shape {list(a.shape)}"
        )
    frames_a, frames_b = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))  # [B*F, C, H, W]
    value = structural_similarity_index_measure(frames_a, frames_b, data_range=(-1.0, 1.0))
    return float(cast(Tensor, value))


def curvature(trajectory: Tensor, times: Tensor | None = None) -> Curvature:
    """Shape of sampling paths, to say how much few-step sampling can lose.

    Args:
        trajectory: ``[S+1, B, ...]``, the states at S+1 times, S >= 2.
        times: ``[S+1]``, strictly monotonic; evenly spaced if None. Only `straightness` needs them.

    Raises:
        UserError: too few states, no clips, values not finite, times that do not fit, or a path
            with a step or a chord of length zero.
    """
    if trajectory.dim() < 3 or len(trajectory) < 3 or trajectory[0].numel() == 0:
        raise UserError(
            "a trajectory must be [S+1, B, ...] with S >= 2 and B >= 1, "
            f"got shape {list(trajectory.shape)}"
        )
    points = trajectory.detach().double().flatten(2)  # [S+1, B, N]
    if not torch.isfinite(points).all():
        raise UserError("the trajectory holds values that are not finite")
    gaps = _time_steps(times, len(points)).to(points.device)  # [S], sums to 1
    steps = points.diff(dim=0)  # [S, B, N]
    chord = points[-1] - points[0]  # [B, N]
    lengths, span = steps.norm(dim=2), chord.norm(dim=1)
    if (lengths == 0).any() or (span == 0).any():
        raise UserError("the trajectory has a path with a step or a chord of length zero")
    cosine = F.cosine_similarity(steps[1:], steps[:-1], dim=2)
    velocity = steps / gaps[:, None, None]
    deviation = (velocity - chord).square().sum(2) / span.square()  # [S, B]
    return Curvature(
        turning=(1 - cosine).mean().item(),
        detour=(lengths.sum(0) / span - 1).mean().item(),
        straightness=(deviation * gaps[:, None]).sum(0).mean().item(),
    )


def _time_steps(times: Tensor | None, count: int) -> Tensor:
    if times is None:
        return torch.full((count - 1,), 1.0 / (count - 1), dtype=torch.float64)
    if times.shape != (count,):
        raise UserError(f"times must be [{count}], got shape {list(times.shape)}")
    gaps = times.double().diff()
    if not ((gaps > 0).all() or (gaps < 0).all()):
        raise UserError("times must be strictly monotonic")
    return gaps / gaps.sum()


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    values = features.detach().double()
    width = values.shape[1]
    return values.mean(0), torch.cov(values.T).reshape(width, width)


def _relative(a: Tensor, b: Tensor, zero: str) -> Tensor:
    error = (a - b).double().flatten(1).square().sum(1)
    norm = b.double().flatten(1).square().sum(1)
    if (norm == 0).any():
        raise UserError(f"{zero}: an error relative to it is undefined")
    return error / norm


def _pair(clips: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if clips.shape != reference.shape:
        raise UserError(
            f"clips and reference must have one shape, got {list(clips.shape)} and "
            f"{list(reference.shape)}"
        )
    _check_clips("clips", clips)
    _check_clips("reference", reference)
    return clips.detach().float(), reference.detach().float().to(clips.device)


def _check_clips(name: str, clips: Tensor) -> None:
    if clips.dim() < 2 or clips.numel() == 0:
        raise UserError(f"{name} must hold at least one clip, got shape {list(clips.shape)}")
    if not torch.isfinite(clips).all():
        raise UserError(f"{name} holds values that are not finite")
