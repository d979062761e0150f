# SPDX-License-Identifier: Apache-2.0
"""Clips to train and to measure on: moving digits and real video."""

from disca.data.digits import MovingDigits
from disca.data.source import ClipBatch, ClipSource, build_source

__all__ = ["ClipBatch", "ClipSource", "MovingDigits", "build_source"]
