# SPDX-License-Identifier: Apache-2.0
"""The other fused operations of this package: their value-and-tangent kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from disca_kernels.dual.registry import rule
from disca_kernels.dual.tensor import primals_of, split, tangent
from disca_kernels.ops.adaln_modulate import adaln_modulate, adaln_modulate_jvp
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


def _register(function: Callable[..., Any], pair: Callable[..., Any], operands: str) -> None:
    """Let `pair(primals, tangents, **options)` answer for a function of these operands."""
    names = operands.split()

    @rule(function, fused=True)
    def _pair_of(*args: Any, **options: Any) -> Any:
        stop = max((i + 1 for i, name in enumerate(names) if name in options), default=0)
        given = [*args, *(options.pop(name, None) for name in names[len(args) : stop])]
        primals, tangents = tuple(split(x)[0] for x in given), tuple(map(tangent, given))
        return pair(primals, tangents, **primals_of(options))


_register(adaln_modulate, adaln_modulate_jvp, "x shift scale weight bias")
_register(
    qk_norm_rope,
    qk_norm_rope_jvp,
    "qkv q_weight k_weight cos sin context_qkv context_q_weight context_k_weight",
)
_register(cache_read, cache_read_jvp, "current cache weight bias")
_register(gated_residual, gated_residual_jvp, "x y gate")
_register(gated_residual_adaln, gated_residual_adaln_jvp, "x y gate shift scale weight bias")
_register(gelu_tanh, gelu_tanh_jvp, "x bias prefix")
_register(swiglu, swiglu_jvp, "x bias")
_register(mean_velocity_step, mean_velocity_step_jvp, "x u t r")


@rule(timestep_features, fused=True)
def _timestep_features(t: Any, dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    value, t_dot = split(t)
    # The width may come from the times, (t - r) / 2; it shapes tangents and has none itself.
    return timestep_features_jvp(value, t_dot, dim, **primals_of(options))
