# SPDX-License-Identifier: Apache-2.0
"""Clips to train and to measure on: moving digits and real video."""

from disca.data.digits import MovingDigits
from disca.data.source import ClipBatch, ClipSource, build_source
from disca.data.video import VideoClips

__all__ = ["ClipBatch", "ClipSource", "MovingDigits", "VideoClips", "build_source"]
