# SPDX-License-Identifier: Apache-2.0
"""Gated residual: tokens plus a gated update."""

from disca_kernels.ops.gated_residual.api import gated_residual, gated_residual_jvp

__all__ = ["gated_residual", "gated_residual_jvp"]
