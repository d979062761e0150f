# SPDX-License-Identifier: Apache-2.0
"""SwiGLU with bias."""

from disca_kernels.ops.swiglu.api import swiglu, swiglu_jvp

__all__ = ["swiglu", "swiglu_jvp"]
