# SPDX-License-Identifier: Apache-2.0
"""Scores of generated clips: semantics, quality, error against a reference run, path shape."""

from disca.eval.classifier import ClipClassifier, train_classifier
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
    "train_classifier",
]
