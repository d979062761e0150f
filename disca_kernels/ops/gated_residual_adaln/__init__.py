# SPDX-License-Identifier: Apache-2.0
"""Gated residual with the modulation that follows it."""

from disca_kernels.ops.gated_residual_adaln.api import (
    gated_residual_adaln,
    gated_residual_adaln_jvp,
)

__all__ = ["gated_residual_adaln", "gated_residual_adaln_jvp"]
