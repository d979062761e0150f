# SPDX-License-Identifier: Apache-2.0
"""Scores of generated clips: semantics, quality, error against a reference run, path shape."""

from disca.eval.classifier import ClipClassifier, train_classifier
from disca.eval.distances import (
    RealDistances,
    SlicedWasserstein,
    real_distances,
    sliced_wasserstein,
)
from disca.eval.scores import (
    Curvature,
    RealScores,
    SemanticScore,
    curvature,
    frechet_distance,
    jitter,
    psnr,
    real_scores,
    relative_error,
    relative_errors,
    semantic_score,
    ssim,
)

__all__ = [
    "ClipClassifier",
    "Curvature",
    "RealDistances",
    "RealScores",
    "SemanticScore",
    "SlicedWasserstein",
    "curvature",
    "frechet_distance",
    "jitter",
    "psnr",
    "real_distances",
    "real_scores",
    "relative_error",
    "relative_errors",
    "semantic_score",
    "sliced_wasserstein",
    "ssim",
    "train_classifier",
]
