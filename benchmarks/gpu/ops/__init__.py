# SPDX-License-Identifier: Apache-2.0
"""What is measured, operations and the predictor step; a new one is a module with `OP` here."""

from benchmarks.gpu.model import Op
from benchmarks.gpu.ops import (
    adaln_modulate,
    attention,
    cache_read,
    gated_residual,
    gated_residual_adaln,
    gelu_tanh,
    mean_velocity_step,
    predictor_step,
    qk_norm_rope,
    swiglu,
    timestep_features,
)

OPS: dict[str, Op] = {
    module.OP.name: module.OP
    for module in (
        attention,
        adaln_modulate,
        cache_read,
        gated_residual,
        gated_residual_adaln,
        gelu_tanh,
        swiglu,
        qk_norm_rope,
        mean_velocity_step,
        timestep_features,
        predictor_step,
    )
}
