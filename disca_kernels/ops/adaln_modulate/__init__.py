# SPDX-License-Identifier: Apache-2.0
"""Adaptive layer-norm modulation."""

from disca_kernels.ops.adaln_modulate.api import adaln_modulate, adaln_modulate_jvp

__all__ = ["adaln_modulate", "adaln_modulate_jvp"]
