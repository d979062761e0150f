# SPDX-License-Identifier: Apache-2.0
"""Fused operations for video diffusion transformers.

Importing this package loads neither the compiled extension nor Triton: both are loaded by the
first call that needs them, so an unusable backend never breaks an import.
"""

from disca_kernels._version import __version__
from disca_kernels.backend import Backend, BackendError, resolve, use_backend, why_not
from disca_kernels.ops.adaln_modulate import adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.attention import attention, attention_jvp, attention_tangent
from disca_kernels.ops.cache_read import cache_read, cache_read_jvp
from disca_kernels.ops.gated_residual import gated_residual, gated_residual_jvp
from disca_kernels.ops.gated_residual_adaln import (
    gated_residual_adaln,
    gated_residual_adaln_jvp,
)
from disca_kernels.ops.gelu_tanh import gelu_tanh, gelu_tanh_jvp
from disca_kernels.ops.mean_velocity_step import mean_velocity_step, mean_velocity_step_jvp
from disca_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_jvp
from disca_kernels.ops.swiglu import swiglu, swiglu_jvp
from disca_kernels.ops.timestep_features import timestep_features, timestep_features_jvp

__all__ = [
    "Backend",
    "BackendError",
    "__version__",
    "adaln_modulate",
    "adaln_modulate_jvp",
    "attention",
    "attention_jvp",
    "attention_tangent",
    "cache_read",
    "cache_read_jvp",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_jvp",
    "gated_residual_jvp",
    "gelu_tanh",
    "gelu_tanh_jvp",
    "mean_velocity_step",
    "mean_velocity_step_jvp",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "resolve",
    "swiglu",
    "swiglu_jvp",
    "timestep_features",
    "timestep_features_jvp",
    "use_backend",
    "why_not",
]
