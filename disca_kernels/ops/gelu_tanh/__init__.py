# SPDX-License-Identifier: Apache-2.0
"""GELU in its tanh form with bias, behind a prefix."""

from disca_kernels.ops.gelu_tanh.api import gelu_tanh, gelu_tanh_jvp

__all__ = ["gelu_tanh", "gelu_tanh_jvp"]
