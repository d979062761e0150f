# SPDX-License-Identifier: Apache-2.0
"""Public `timestep_features` and `timestep_features_jvp`: contract, validation, backend."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.ops.timestep_features.reference import (
    timestep_features_jvp_reference,
    timestep_features_reference,
)


def timestep_features(
    t: Tensor,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute `[cos(scale * t * f) | sin(scale * t * f)]` for times t of [B]."""
    if has_torch_function((t,)):
        result: Tensor = handle_torch_function(
            timestep_features, (t,), t, dim, scale=scale, max_period=max_period,
            tangent_width=tangent_width, backend=backend,
        )  # fmt: skip
        return result
    return timestep_features_reference(t, dim, scale=scale, max_period=max_period)


def timestep_features_jvp(
    t: Tensor,
    t_dot: Tensor,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the features and the derivative of their average over `t - h .. t + h`."""
    if has_torch_function((t, t_dot)):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            timestep_features_jvp, (t, t_dot), t, t_dot, dim, scale=scale, max_period=max_period,
            tangent_width=tangent_width, backend=backend,
        )  # fmt: skip
        return pair
    features = timestep_features_reference(t, dim, scale=scale, max_period=max_period)
    with torch.no_grad():
        _, features_dot = timestep_features_jvp_reference(
            t, t_dot, dim, scale=scale, max_period=max_period, tangent_width=tangent_width
        )
    return features, features_dot
