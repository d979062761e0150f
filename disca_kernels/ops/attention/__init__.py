# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with a value-and-tangent kernel."""

from disca_kernels.ops.attention.api import attention, attention_jvp, attention_tangent

__all__ = ["attention", "attention_jvp", "attention_tangent"]
